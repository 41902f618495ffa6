"""The loop around a training step: progress, metrics, and whatever happens every so many steps."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from diffjax.training.step import TrainState


class Every(NamedTuple):
    """Call action(state) when the number of steps done is a multiple of `steps`, and once at the end; 0 for never."""

    steps: int
    action: Callable[[TrainState], None]


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function true: a step or a save under way ends in order. The
    second raises KeyboardInterrupt as usual.
    """
    interrupted = False

    def handle(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


class MetricsFile:
    """metrics.jsonl: one JSON object a line, each with the number of steps done."""

    def __init__(self, path: Path, start: int) -> None:
        """Lines after step `start`, of a run that went further than its last checkpoint, are dropped."""
        self._path = path
        kept = [line for line in _lines(path) if line["step"] <= start]
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        whole.replace(path)

    def write(self, step: int, **metrics: Any) -> None:
        """Append one line; metrics are numbers, or arrays of one."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **{name: float(value) for name, value in metrics.items()}}) + "\n")


def fit(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    batches: Iterator[Any],
    steps: int,
    log: Callable[..., None],
    log_every: int,
    every: tuple[Every, ...] = (),
    stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Train until `steps` steps are done, with a progress bar; returns the state after them, or after the step at which
    stop() became true.

    step: compiled, (state, batch) -> (state, metrics), may reuse the memory of its state. log(step, **metrics) gets
    the metrics of a step, every log_every steps and at the end. A step's metrics are fetched only when the next is
    under way, so that the device never waits for the host. FloatingPointError for a loss that is not a number, before
    any action sees that step.
    """
    start = int(state.step)
    logged, since = start, time.perf_counter()
    pending: tuple[int, dict[str, Any]] | None = None
    with tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True) as bar:

        def collect() -> None:
            nonlocal pending, logged, since
            if pending is None:
                return
            n, metrics = pending[0], jax.device_get(pending[1])
            pending = None
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(f"the loss is {metrics['loss']} at step {n}")
            bar.set_postfix(loss=f"{float(metrics['loss']):.4f}", refresh=False)
            bar.update(n - bar.n)
            if n % log_every == 0 or n == steps:
                now = time.perf_counter()
                rate = {"steps_per_second": (n - logged) / (now - since)} if n > logged else {}
                log(n, **metrics, **rate)
                logged, since = n, now

        for n in range(start + 1, steps + 1):
            state, metrics = step(state, next(batches))
            collect()
            pending = n, metrics
            due = [each.action for each in every if each.steps and (n % each.steps == 0 or n == steps)]
            if due:
                collect()
            for action in due:
                action(state)
            if due or n == start + 1:  # the rate is that of training: neither compiling nor what was due counts
                jax.block_until_ready(state)
                logged, since = n, time.perf_counter()
            if stop():
                break
        collect()
    return state


def _lines(path: Path) -> list[dict[str, Any]]:
    # A line cut short by a kill is dropped with the steps that it would have told of.
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
