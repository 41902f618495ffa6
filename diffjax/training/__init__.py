"""Training: the step, its parallel forms, data, checkpoints and the loop."""
