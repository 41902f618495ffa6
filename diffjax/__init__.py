"""Diffusion models in JAX and Flax as pure functions."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffjax import (
        denoiser,
        distillation,
        guidance,
        likelihood,
        loss,
        parameterization,
        process,
        sampler,
        schedule,
        sde,
        solvers,
        testing,
    )

__version__ = "0.1.0"
__all__ = [
    "denoiser",
    "distillation",
    "guidance",
    "likelihood",
    "loss",
    "parameterization",
    "process",
    "sampler",
    "schedule",
    "sde",
    "solvers",
    "testing",
]


def __getattr__(name: str) -> ModuleType:
    # Imported when first used, so that the command's --help does not wait for JAX.
    if name in __all__:
        return importlib.import_module(f"diffjax.{name}")
    raise AttributeError(f"module 'diffjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
