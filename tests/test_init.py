"""`import diffjax` gives every module, when it is first named."""

import pkgutil
import subprocess
import sys

import pytest
from helpers import naming

import diffjax


def test_modules_are_listed():
    names = {found.name for found in pkgutil.iter_modules(diffjax.__path__)} - {"_lazy", "__main__"}
    assert names <= set(dir(diffjax))
    assert set(diffjax.__all__) == names - {"cli"}
    for package in ("data", "devices", "evaluation", "inference", "interop", "nn", "training"):
        inside = getattr(diffjax, package)
        assert {found.name for found in pkgutil.iter_modules(inside.__path__)} <= set(dir(inside))


def test_modules_are_imported_when_named():
    """JAX is not imported before, nor by the list of modules."""
    code = """
import sys, diffjax
dir(diffjax)
assert "jax" not in sys.modules
assert diffjax.sampler.ddim and diffjax.inference.pipeline.Pipeline and diffjax.nn.layers.GroupNorm
assert diffjax.inference.samplers.parse_sampler
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_name():
    with pytest.raises(AttributeError, match=naming("diffjax.nn", "unett")):
        _ = diffjax.nn.unett
