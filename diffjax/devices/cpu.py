"""What XLA needs to be told on CPUs to run at their speed. GPUs and TPUs are left alone."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os

import jax

# XLA's newer library for convolutions is slower than its older one below about 100 channels (measured on 2 cores with
# AVX-512: 92 against 150 GFLOP/s of 64x28x28x64); for sums over an image it is faster than XLA's own loops.
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
LIBRARY = "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
NEWEST = (0, 12)  # of the versions of jax that know the flag. XLA ends a program that gives it an unknown one.
# mallopt's names and values, from malloc.h: freed memory is kept, in place of being fetched anew, page by page, for
# every large array of every call (which costs a forward pass of 36 M parameters a sixth of its time).
MALLOC = {"M_MMAP_THRESHOLD": (-3, 2**30), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**28)}


def tune() -> None:
    """Set XLA_FLAGS and the memory allocator for this process, if it will run on CPUs; call it before JAX is used.
    What the environment says already, of either, is left as it is.
    """
    if not _on_cpu():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags and jax.__version_info__[:2] <= NEWEST:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}={LIBRARY}".strip()
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(OSError, AttributeError):  # no glibc here: nothing to tune
            for parameter, value in MALLOC.values():
                ctypes.CDLL(None).mallopt(parameter, value)


def _on_cpu() -> bool:
    chosen: str | None = getattr(jax.config, "jax_platforms", None) or os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen.split(",")[0] == "cpu"
    accelerators = importlib.metadata.entry_points(group="jax_plugins")
    return not accelerators and importlib.util.find_spec("libtpu") is None
