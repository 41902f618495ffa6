import itertools
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming

from diffjax.training.loop import LoopOptions, PeriodicAction, catch_signals, fit
from diffjax.training.state import TrainState


def count(state, batches):
    """Steps whose losses are their batches; non-finite ones are skipped."""
    losses = np.asarray(batches, np.float32)
    skipped = state.skipped + np.cumsum(~np.isfinite(losses))
    state = state._replace(step=state.step + len(losses), skipped=skipped[-1])
    return state, {"loss": losses, "skipped": skipped, "learning_rate": np.full(len(losses), 0.25)}


def state(step=0):
    return TrainState(jnp.int32(step), jnp.int32(0), None, None, None)


def ignore(*_, **__):
    pass


@pytest.mark.parametrize("per_dispatch", [1, 2, 5, 100])
def test_metrics_and_actions(per_dispatch):
    """Every step is logged with its own metrics; an action comes after those of its step."""
    seen = []

    def log(step, **metrics):
        seen.append((float(metrics["loss"]), step))

    actions = tuple(
        PeriodicAction(n, lambda s, n=n: seen.append((f"every {n}", int(s.step))))
        for n in (3, 4, 0)
    )
    end = fit(count, state(2), itertools.count(3), log, LoopOptions(10, 1, per_dispatch), actions)
    assert int(end.step) == 10
    assert [s for name, s in seen if name == "every 3"] == [3, 6, 9, 10]
    assert [s for name, s in seen if name == "every 4"] == [4, 8, 10]
    assert [s for name, s in seen if name == "every 0"] == []
    assert [e for e in seen if not isinstance(e[0], str)] == [(float(n), n) for n in range(3, 11)]
    assert seen.index(("every 3", 6)) > seen.index((6.0, 6))


def test_metrics_are_fetched_one_dispatch_late():
    seen = []

    def step(state, batches):
        seen.append(("run", int(state.step) + 1))
        return count(state, batches)

    def log(step, **metrics):
        seen.append(("log", step))

    fit(step, state(), itertools.count(1), log, LoopOptions(4, 2))
    assert seen == [("run", 1), ("run", 2), ("run", 3), ("log", 2), ("run", 4), ("log", 4)]


def test_rate_is_that_of_training():
    """Neither the first dispatch, which compiles, nor actions count."""
    rates = []

    def slow_first(state, batches):
        time.sleep(0.5 if state.step == 0 else 0.01)
        return count(state, batches)

    def log(step, **metrics):
        rates.append(metrics.get("steps_per_second"))

    action = PeriodicAction(4, lambda state: time.sleep(0.5))
    fit(slow_first, state(), itertools.count(1), log, LoopOptions(10, 1), (action,))
    assert rates[0] is None
    assert min(rates[1:]) > 3  # below 2 if it counted them


@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_skipped_steps_in_a_row_end_training(per_dispatch):
    fine, bad = 1.0, float("nan")
    losses = [fine, bad, bad, fine, 2.0, bad, bad, bad, fine, fine]
    with pytest.raises(FloatingPointError, match=naming(3, 8, 0.25, "nan")):
        fit(count, state(), iter(losses), ignore, LoopOptions(10, 1, per_dispatch, max_skipped=3))
    options = LoopOptions(10, 1, per_dispatch, max_skipped=4)
    end = fit(count, state(), iter(losses), ignore, options)
    assert (int(end.step), int(end.skipped)) == (10, 5)


def test_stop_is_asked_once_a_dispatch():
    answers = iter([0, 0, 2])
    end = fit(
        count,
        state(),
        itertools.count(1),
        ignore,
        LoopOptions(100, 1, 5),
        (),
        lambda: next(answers),
    )
    assert int(end.step) == 15


def test_the_bar_says_what_runs(capsys):
    """Compiling is shown until the first dispatch has returned; actions by their names."""
    shown = []

    def step(state, batches):
        shown.append(capsys.readouterr().err)
        return count(state, batches)

    def act(state):
        shown.append(capsys.readouterr().err)

    actions = (PeriodicAction(2, act, "saving"), PeriodicAction(3, act, "loss curve"))
    fit(step, state(), itertools.count(1), ignore, LoopOptions(3, 1), actions)
    names = ["compiling", "train", "saving", "train", "saving", "loss curve"]
    assert [text.split("\r")[-1].split(":")[0] for text in shown] == names


@pytest.mark.parametrize("per_dispatch", [1, 2])
def test_training_ends_with_its_batches(per_dispatch):
    """Of a dispatch that is not whole nothing is trained."""
    end = fit(count, state(), iter([1.0] * 5), ignore, LoopOptions(10, 1, per_dispatch))
    assert int(end.step) == 5 // per_dispatch * per_dispatch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number):
    """The second one has its usual effect."""
    # Processes that a shell starts in the background ignore Ctrl-C.
    at_start = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with catch_signals() as received:
        assert received() == 0
        signal.raise_signal(number)
        assert received() == number
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    signal.signal(signal.SIGINT, at_start)
