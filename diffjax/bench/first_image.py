"""The time from the start of a process to its first image, in parts.

A process of its own measures them (`python -m diffjax.bench.first_image RUN`), since only a new
process imports.
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
    """Seconds of each of PARTS, for a configuration's network and an image by DDIM-50.

    The first is of a process that compiles, the second of one that finds compiled programs in the
    persistent cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        _write_run(name, run)
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return [_measure_in_process(run, environment) for _ in range(2)]


def _write_run(name: str, workdir: Path) -> None:
    from diffjax.bench.models import bench_model
    from diffjax.training.run_folder import write_run

    model = bench_model(name)
    write_run(model.info, model.params, 0, workdir)


def _measure_in_process(run: Path, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "diffjax.bench.first_image", str(run)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def _measure_here(run: str) -> dict[str, float]:
    times = [time.perf_counter()]

    from diffjax.devices import cpu

    cpu.tune()
    import jax
    import numpy as np

    from diffjax import denoiser, sampler, schedule
    from diffjax.inference.model import load_model

    times.append(time.perf_counter())
    model = load_model(run)
    plan = sampler.ddim(model.schedule, schedule.trailing(model.schedule, 50))
    keys = sampler.image_keys(jax.random.key(0), np.arange(1))
    condition = model.info.conditioning.zeros(1)
    times.append(time.perf_counter())

    def program(params: Any, condition: Any, rows: Any, carry: Any, keys: Any) -> Any:
        conditional = denoiser.from_network(model.network, params, model.parameterization)
        denoise = denoiser.clip(denoiser.condition_on(conditional, condition))
        return sampler.scan_plan(denoise, rows, carry, keys)

    x = sampler.init_noise(plan, keys, model.info.x_shape)
    rows, *_ = sampler.segments(plan, x.dtype)
    lowered = jax.jit(program).lower(model.params, condition, rows, (x, x, x), keys)
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    sample = sampler.sample(lambda *given: compiled(model.params, condition, *given), plan, x, keys)
    jax.block_until_ready(sample)
    times.append(time.perf_counter())
    return dict(zip(PARTS, np.diff(times).tolist(), strict=True))


if __name__ == "__main__":
    print(json.dumps(_measure_here(sys.argv[1])))
