import os
import subprocess
import sys
import types

import jax
import pytest

from diffjax.devices import cpu


@pytest.fixture
def flags(monkeypatch):
    """XLA_FLAGS after tuning from these."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")  # this process's memory is left alone

    def tuned(before, platforms="cpu"):
        monkeypatch.setenv("XLA_FLAGS", before)
        monkeypatch.setattr(cpu, "_on_cpu", lambda: platforms == "cpu")
        cpu.tune()
        return os.environ["XLA_FLAGS"]

    return tuned


def test_users_flags_stay(flags):
    assert flags("--xla_dump_to=x") == f"--xla_dump_to=x {cpu.FLAG}={cpu.LIBRARY}"
    assert flags(f"{cpu.FLAG}=") == f"{cpu.FLAG}="


def test_accelerators_and_newer_versions_are_left_alone(flags, monkeypatch):
    assert flags("", platforms="gpu") == ""
    monkeypatch.setattr(jax, "__version_info__", (cpu.NEWEST[0], cpu.NEWEST[1] + 1, 0))
    assert flags("") == ""


@pytest.mark.parametrize(
    ("platforms", "expected"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)]
)
def test_platform(monkeypatch, platforms, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_platforms=None))
    assert cpu._on_cpu() is expected


def test_xla_knows_the_flag():
    """XLA aborts on a flag that it does not know."""
    code = (
        "from diffjax.devices import cpu; cpu.tune(); import jax.numpy as jnp;"
        " print(float((jnp.eye(9) @ jnp.eye(9)).sum()))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "9.0"), done.stderr
