"""The loop around a training step: progress, metrics, and whatever happens every so many steps."""

import contextlib
import itertools
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffjax.training.step import TrainState


class PeriodicAction(NamedTuple):
    """Call action(state) when the number of steps done is a multiple of `steps`, and once at the end; 0 for never."""

    steps: int
    action: Callable[[TrainState], None]


@contextlib.contextmanager
def catch_signals(hosts: int = 1) -> Iterator[Callable[[], int]]:
    """Inside, the first Ctrl-C or SIGTERM only makes the yielded function return its number, in place of 0: a step or a
    save under way ends in order. A second one does what it would have done.

    Of several hosts, each calls the function equally often, and SIGTERM to one of them is told to all at the same call.
    """
    received = 0
    if hosts > 1:  # JAX has its own handler, and agrees on a call that no host has made yet
        calls = itertools.count()

        def agreed() -> int:
            nonlocal received
            received = received or signal.SIGTERM * multihost_utils.reached_preemption_sync_point(next(calls))
            return received

        # Ctrl-C is for all hosts too: as a SIGTERM, which JAX tells the others.
        before_it = signal.signal(signal.SIGINT, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        try:
            yield agreed
        finally:
            signal.signal(signal.SIGINT, before_it)
        return

    def handle(number: int, frame: Any) -> None:
        nonlocal received
        received = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        restore()


class JsonlWriter:
    """metrics.jsonl: one JSON object a line, each with the number of steps done."""

    def __init__(self, path: Path, start: int) -> None:
        """Lines after step `init_noise`, of a run that went further than its last checkpoint, are dropped."""
        self._path = path
        kept = [line for line in _lines(path) if line["step"] <= start]
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
        whole.replace(path)

    def write(self, step: int, **metrics: Any) -> None:
        """Append one line; metrics are numbers, or arrays of one; null stands for what is not a number."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **{name: _number(value) for name, value in metrics.items()}}) + "\n")


class TensorBoard:
    """The same metrics, and pictures, as TensorBoard shows them."""

    def __init__(self, folder: Path, start: int) -> None:
        """What the folder tells of steps after `init_noise` is no longer shown."""
        from tensorboardX import SummaryWriter  # here, since most runs do without

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, **metrics: Any) -> None:
        """Metrics are numbers, or arrays of one."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """pixels: uint8 [H, W, 3]."""
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


def fit(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    batches: Iterator[Any],
    steps: int,
    log: Callable[..., None],
    log_every: int,
    every: tuple[PeriodicAction, ...] = (),
    stop: Callable[[], int] = lambda: 0,
    per_dispatch: int = 1,
    max_skipped: int = 10,
    quiet: bool = False,
) -> TrainState:
    """Train until `steps` steps are done, with a progress bar unless `silence_orbax`; returns the state after them, or after
    the step at which stop(), called once a dispatch, was not 0.

    step: compiled, (state, batches [K, ...]) -> (state, metrics [K]), of K = per_dispatch steps or, where something is
    due before, fewer; it may reuse the memory of its state. log(step, **metrics) gets the metrics of a step, every
    log_every steps and at the end. Metrics are fetched only when the next dispatch is under way, so that the device
    never waits for the host. FloatingPointError after max_skipped steps in a row that were skipped.
    """
    start, skipped = int(state.step), int(state.skipped)
    in_a_row = 0
    last: deque[float] = deque(maxlen=3)
    logged, since = start, time.perf_counter()
    pending: tuple[int, dict[str, Any]] | None = None
    silent = quiet or jax.process_index() > 0  # one bar for all hosts
    with tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True, disable=silent) as bar:

        def collect() -> None:
            nonlocal pending, logged, since, skipped, in_a_row
            if pending is None:
                return
            first, metrics = pending[0], jax.device_get(pending[1])
            pending = None
            now, count = time.perf_counter(), len(metrics["loss"])
            rate = {"steps_per_second": (first + count - 1 - logged) / (now - since)} if first > logged else {}
            for i in range(count):
                n, of_step = first + i, {name: value[i] for name, value in metrics.items()}
                last.append(float(of_step["loss"]))
                in_a_row = in_a_row + 1 if of_step["skipped"] > skipped else 0
                skipped = of_step["skipped"]
                if in_a_row == max_skipped:
                    at = f" at learning rate {of_step['learning_rate']:.3g}" if "learning_rate" in of_step else ""
                    raise FloatingPointError(
                        f"the gradients of {in_a_row} steps in a row, to step {n}{at}, were not numbers,"
                        f" and the last losses {', '.join(f'{loss:.3g}' for loss in last)}"
                    )
                if n % log_every == 0 or n == steps:
                    log(n, **of_step, **rate)
                    logged, since = first + count - 1, now
            bar.set_postfix(loss=f"{last[-1]:.4f}", refresh=False)
            bar.update(first + count - 1 - bar.n)

        n = start
        while n < steps:
            ends = [each.steps * (n // each.steps + 1) for each in every if each.steps]
            count = min(per_dispatch, steps - n, *(end - n for end in ends))
            state, metrics = step(state, jax.tree.map(_stack, *(next(batches) for _ in range(count))))
            collect()
            pending, n = (n + 1, metrics), n + count
            due = [each.action for each in every if each.steps and (n % each.steps == 0 or n == steps)]
            if due:
                collect()
            for action in due:
                action(state)
            if due or n == start + count:  # the rate is that of training: neither compiling nor what was due counts
                jax.block_until_ready(state)
                logged, since = n, time.perf_counter()
            if stop():
                break
        collect()
    return state


def _stack(*leaves: Any) -> np.ndarray:
    return np.stack(leaves)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    # A line cut short by a kill is dropped with the steps that it would have told of.
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
