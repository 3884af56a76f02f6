"""The trainer of both stages: arguments, model, steps, checkpoints, going on, many processes, what a run shows."""
