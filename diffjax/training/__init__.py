"""Training: state, step, loop, and the trainer that runs them in a run folder."""

from diffjax._lazy import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
