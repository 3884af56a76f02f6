"""What a run needs, told before it starts: parameters, memory per GPU, steps, time and data."""
