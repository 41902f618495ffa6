"""Training state, steps and loops."""
