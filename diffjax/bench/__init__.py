"""Measurements of what things cost, for `diffjax bench` and `diffjax dry-run`."""

from diffjax._lazy import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
