"""Training: state, step, loop, and the trainer that runs them in a run folder."""
