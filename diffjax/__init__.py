"""Diffusion models in JAX and Flax as pure functions."""

from typing import TYPE_CHECKING

from diffjax._lazy import modules_of

if TYPE_CHECKING:
    from diffjax import (
        averaging,
        bench,
        build,
        checkpoint,
        config,
        data,
        denoiser,
        devices,
        distillation,
        evaluation,
        guidance,
        inference,
        interop,
        likelihood,
        loss,
        nn,
        parameterization,
        process,
        sampler,
        schedule,
        sde,
        solvers,
        testing,
        training,
    )

__version__ = "0.1.0"
__all__ = [
    "averaging",
    "bench",
    "build",
    "checkpoint",
    "config",
    "data",
    "denoiser",
    "devices",
    "distillation",
    "evaluation",
    "guidance",
    "inference",
    "interop",
    "likelihood",
    "loss",
    "nn",
    "parameterization",
    "process",
    "sampler",
    "schedule",
    "sde",
    "solvers",
    "testing",
    "training",
]
# Modules are imported when first used, so that the command's --help does not wait for JAX.
__getattr__, __dir__ = modules_of(__name__, __path__)
