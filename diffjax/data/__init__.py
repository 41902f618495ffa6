"""Data sets, batches and image files."""

from diffjax._lazy import modules_of

__getattr__, __dir__ = modules_of(__name__, __path__)
