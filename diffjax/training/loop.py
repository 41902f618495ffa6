"""The loop around a train step: progress, metrics, periodic actions, signals."""

import contextlib
import itertools
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffjax.training.state import TrainState

COMPILING, TRAINING = "compiling", "train"  # what the progress bar shows


class PeriodicAction(NamedTuple):
    """Call action(state) every `steps` steps and after the last one; never if 0."""

    steps: int
    action: Callable[[TrainState], None]
    name: str = ""  # what the progress bar shows meanwhile

    def is_due(self, step: int, last: int) -> bool:
        """Return whether to call it after this step of a run that ends with `last`."""
        return self.steps > 0 and (step % self.steps == 0 or step == last)


@dataclass(frozen=True)
class LoopOptions:
    """Options of the training loop."""

    steps: int  # in total
    log_every: int  # steps between metrics that are logged
    per_dispatch: int = 1  # steps per call of the compiled step, at most
    max_skipped: int = 10  # consecutive skipped steps that end training with an error
    progress: bool = True  # show a progress bar, on process 0


# ------------------------------------------------------------------------------- metrics


class MetricsBuffer:
    """The metrics of the last dispatch, on the device until the next one runs.

    They are fetched late so that the device never waits for the host.
    """

    def __init__(
        self, state: TrainState, log: Callable[..., None], options: LoopOptions, bar: tqdm
    ) -> None:
        """state: before the first dispatch; log: called as log(step, **metrics)."""
        self._log, self._options, self._bar = log, options, bar
        self._skipped, self._in_a_row = int(state.skipped), 0
        self._losses: deque[float] = deque(maxlen=3)
        self._pending: tuple[int, dict[str, Any]] | None = None
        self.restart_clock(int(state.step))

    def restart_clock(self, step: int) -> None:
        """Measure the rate of training from here, after this step."""
        self._clock = step, time.perf_counter()

    def push(self, first: int, metrics: dict[str, Any]) -> None:
        """Keep the metrics [K] of the steps from `first` on, and flush those before."""
        self.flush()
        self._pending = first, metrics

    def flush(self) -> None:
        """Fetch and log the metrics that are kept, and move the progress bar.

        Raises: FloatingPointError after options.max_skipped skipped steps in a row.
        """
        if self._pending is None:
            return
        first, metrics = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        last = first + len(metrics["loss"]) - 1
        now = time.perf_counter()
        rate = self._rate(first, last, now)
        for i, step in enumerate(range(first, last + 1)):
            values = {name: value[i] for name, value in metrics.items()}
            self._check(step, values)
            if step % self._options.log_every == 0 or step == self._options.steps:
                self._log(step, **values, **rate)
                self._clock = last, now
        self._bar.set_postfix(loss=f"{self._losses[-1]:.4f}", refresh=False)
        self._bar.update(last - self._bar.n)

    def _rate(self, first: int, last: int, now: float) -> dict[str, float]:
        step, since = self._clock
        return {"steps_per_second": (last - step) / (now - since)} if first > step else {}

    def _check(self, step: int, values: dict[str, Any]) -> None:
        self._losses.append(float(values["loss"]))
        self._in_a_row = self._in_a_row + 1 if values["skipped"] > self._skipped else 0
        self._skipped = values["skipped"]
        if self._in_a_row < self._options.max_skipped:
            return
        at = f" at learning rate {values['learning_rate']:.3g}" if "learning_rate" in values else ""
        losses = ", ".join(f"{loss:.3g}" for loss in self._losses)
        raise FloatingPointError(
            f"gradients of {self._in_a_row} steps in a row, to step {step}{at}, are not finite, and"
            f" the last losses are {losses}"
        )


# ------------------------------------------------------------------------------- the loop


def fit(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]],
    state: TrainState,
    batches: Iterator[Any],
    log: Callable[..., None],
    options: LoopOptions,
    actions: tuple[PeriodicAction, ...] = (),
    stop: Callable[[], int] = lambda: 0,
) -> TrainState:
    """Train until options.steps steps are done, or stop() is not 0 after a dispatch.

    step: compiled, (state, batches [K, ...]) -> (state, metrics [K]), for K of options.per_dispatch
    steps, or fewer where an action is due before; it may reuse the memory of its state. batches:
    where they end, training does. log(step, **metrics) gets the metrics of a step, every
    options.log_every steps and at the end.

    Raises: FloatingPointError after options.max_skipped skipped steps in a row.
    """
    start = done = int(state.step)
    with _progress_bar(start, options) as bar:
        buffer = MetricsBuffer(state, log, options, bar)
        while done < options.steps:
            count = _dispatch_length(done, options, actions)
            read = list(itertools.islice(batches, count))
            if len(read) < count:
                break
            state, metrics = step(state, _stack(read))
            buffer.push(done + 1, metrics)
            is_first, done = done == start, done + count
            due = [each for each in actions if each.is_due(done, options.steps)]
            if due:
                buffer.flush()
            for each in due:
                bar.set_description(each.name or TRAINING)
                each.action(state)
            if due or is_first:  # the rate counts neither compiling nor actions
                jax.block_until_ready(state)
                bar.set_description(TRAINING)
                buffer.restart_clock(done)
            if stop():
                break
        buffer.flush()
    return state


def _dispatch_length(done: int, options: LoopOptions, actions: tuple[PeriodicAction, ...]) -> int:
    """The number of steps of the next dispatch, which ends where an action is due."""
    until_due = (action.steps - done % action.steps for action in actions if action.steps)
    return min(options.per_dispatch, options.steps - done, *until_due)


def _progress_bar(start: int, options: LoopOptions) -> tqdm:
    hidden = not options.progress or jax.process_index() > 0
    return tqdm(
        total=options.steps,
        initial=start,
        desc=COMPILING,
        unit="step",
        dynamic_ncols=True,
        disable=hidden,
    )


def _stack(batches: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


# ------------------------------------------------------------------------------- signals


@contextlib.contextmanager
def catch_signals(processes: int = 1) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the first SIGINT or SIGTERM, without raising.

    The function returns 0 before that. A step or a save in progress so ends in order; a second
    signal has its usual effect.

    Of several processes, each must call the function equally often, and a signal to one of them is
    reported to all at the same call.
    """
    if processes > 1:
        agreement = _Agreement()
        # Ctrl-C is for all processes too: it becomes a SIGTERM, which JAX reports to the others.
        previous = {signal.SIGINT: signal.signal(signal.SIGINT, _terminate)}
        received = agreement.received
    else:
        catcher = _Catcher()
        previous = catcher.previous
        received = catcher.received
    try:
        yield received
    finally:
        _restore(previous)


class _Catcher:
    """A handler that notes the first SIGINT or SIGTERM, and restores the previous handlers."""

    def __init__(self) -> None:
        self._number = 0
        self.previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}

    def received(self) -> int:
        return self._number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        _restore(self.previous)


class _Agreement:
    """The signal that all processes agree on, by JAX's own handler of SIGTERM."""

    def __init__(self) -> None:
        self._number, self._calls = 0, itertools.count()

    def received(self) -> int:
        # JAX agrees on a call that no process has made yet.
        if not self._number and multihost_utils.reached_preemption_sync_point(next(self._calls)):
            self._number = signal.SIGTERM
        return self._number


def _terminate(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
