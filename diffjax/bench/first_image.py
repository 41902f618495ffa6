"""From the start of a process to its first image, in parts.

A process of its own measures them (`python -m diffjax.bench.first_image RUN`), since only a new process imports.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("import", "restore", "trace", "compile", "run")


def measure(name: str) -> list[dict[str, float]]:
    """Seconds of each of PARTS, for the network of a configuration and one image by DDIM-50: of a process that
    compiles, and of the next, which finds compiled programs in the persistent cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        _write_run(name, run)
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        command = [sys.executable, "-m", "diffjax.bench.first_image", str(run)]
        return [
            json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
            for _ in range(2)
        ]


def _write_run(name: str, workdir: Path) -> None:
    from diffjax.bench.subject import subject
    from diffjax.build import build_optimizer
    from diffjax.checkpoint import Checkpoints
    from diffjax.inference.pipeline import ModelInfo
    from diffjax.training.step import init_state

    it = subject(name)
    checkpoints = Checkpoints(workdir)
    state = init_state(it.params, build_optimizer(it.config)[0])
    checkpoints.save(state, ModelInfo(it.config, it.image_shape, it.classes).to_dict())
    checkpoints.close()


def _measure_here(run: str) -> dict[str, float]:
    times = [time.perf_counter()]

    def done() -> None:
        times.append(time.perf_counter())

    from diffjax.devices import cpu

    cpu.tune()
    import jax
    import numpy as np

    from diffjax import denoiser, sampler, schedule
    from diffjax.inference.pipeline import load_model

    done()
    opened = load_model(run)
    plan = sampler.ddim(opened.schedule, schedule.trailing(opened.schedule, 50))
    keys = sampler.image_keys(jax.random.key(0), np.arange(1))
    labels = jax.numpy.zeros(1, int) if opened.description.classes else None
    done()

    def program(params: Any, labels: Any, rows: Any, carry: Any, keys: Any) -> Any:
        conditional = denoiser.from_network(opened.network, params, opened.prediction)
        return sampler.scan_plan(denoiser.clip(denoiser.condition_on(conditional, labels)), rows, carry, keys)

    x = sampler.init_noise(plan, keys, opened.description.image_shape)
    rows, *_ = sampler.segments(plan, x.dtype)
    lowered = jax.jit(program).lower(opened.params, labels, rows, (x, x, x), keys)
    done()
    compiled = lowered.compile()
    done()
    jax.block_until_ready(sampler.sample(lambda *given: compiled(opened.params, labels, *given), plan, x, keys))
    done()
    return dict(zip(PARTS, np.diff(times).tolist(), strict=True))


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1])))
