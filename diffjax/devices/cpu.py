"""Settings of XLA and the memory allocator that make CPUs fast."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os

import jax

# XLA's newer library for convolutions is slower than its older one below about 100 channels
# (measured on 2 cores with AVX-512: 92 against 150 GFLOP/s of 64x28x28x64); for sums over an image
# it is faster than XLA's own loops.
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
LIBRARY = "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
# The newest version of jax that is known to have the flag: XLA aborts on an unknown one.
NEWEST = (0, 12)
# mallopt's names and values, from malloc.h. They keep freed memory, which is otherwise fetched
# anew, page by page, for every large array of every call: a sixth of the time of a forward pass of
# 36 M parameters.
MALLOC = {
    "M_MMAP_THRESHOLD": (-3, 2**30),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**28),
}


def tune() -> None:
    """Set XLA_FLAGS and the memory allocator if this process will run on CPUs.

    Call it before JAX is used. Settings that the environment already has are left as they are.
    """
    if not _on_cpu():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags and jax.__version_info__[:2] <= NEWEST:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}={LIBRARY}".strip()
    if not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing to tune
            for parameter, value in MALLOC.values():
                ctypes.CDLL(None).mallopt(parameter, value)


def _on_cpu() -> bool:
    chosen: str | None = getattr(jax.config, "jax_platforms", None)
    chosen = chosen or os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen.split(",")[0] == "cpu"
    accelerators = importlib.metadata.entry_points(group="jax_plugins")
    return not accelerators and importlib.util.find_spec("libtpu") is None
