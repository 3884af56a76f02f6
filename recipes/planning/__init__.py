"""`minigpt4 plan`: parameters, memory per GPU, steps, time and data of a run, before it starts."""
