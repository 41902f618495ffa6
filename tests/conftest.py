"""Eight fake CPU devices stand for a pod, whatever started the tests."""

import os

# Most of the suite's time is compiling: the compiler may be quick rather than good.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=2"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
# XLA sizes its thread pool by the cores it sees; with fewer threads than devices a collective waits for ever.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

settings.register_profile("diffjax", deadline=None, derandomize=True, max_examples=60, print_blob=True)
settings.load_profile("diffjax")


@pytest.fixture
def x64():
    """JAX in double precision."""
    with jax.enable_x64(True):
        yield
