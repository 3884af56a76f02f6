"""Training both stages: arguments, model, trainer, loss, checkpoints, resume, distributed, preemption, callbacks."""
