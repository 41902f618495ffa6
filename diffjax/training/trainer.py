"""The trainer: it opens a run folder, resumes, and trains to the end."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffjax.build import ModelInfo, count_parameters, load_data, model_info
from diffjax.checkpoint import FOLDER, Checkpoints, SaveError, latest_config
from diffjax.config import Config, check_resume
from diffjax.data import image_io
from diffjax.data.batches import batch_stream, first_batches
from diffjax.data.dataset import Dataset, UnreadableError
from diffjax.devices import parallel
from diffjax.devices.distributed import first_process_first
from diffjax.inference.autoencoder import codec_of
from diffjax.inference.model import TrainedModel
from diffjax.inference.pipeline import NotFiniteError, describe_devices
from diffjax.nn.conditioning import difference, with_names
from diffjax.nn.registry import network_name
from diffjax.training.averages import StoredAverages
from diffjax.training.distill import build_distillation, student_info
from diffjax.training.latents import keep_autoencoder
from diffjax.training.lock import take_lock
from diffjax.training.loop import LoopOptions, PeriodicAction, catch_signals, fit
from diffjax.training.metrics import JsonlWriter, TensorBoard, plot_curve
from diffjax.training.preview import Preview, make_preview
from diffjax.training.setup import ParallelTraining, Training, build_training
from diffjax.training.state import TrainState, state_from_trees, state_to_trees

METRICS, CURVE, PREVIEWS, TENSORBOARD = "metrics.jsonl", "curve.png", "previews", "tensorboard"
HELD_OUT_BATCHES = 10  # at most, per evaluation
Report = Callable[[str], Any]  # called with sentences on the progress of a run


class TrainResult(NamedTuple):
    """How a training run ended."""

    status: Literal["done", "already_done", "interrupted"]
    step: int  # steps done in total
    signal: int = 0  # that interrupted it


def train(
    config: Config,
    workdir: Path,
    *,
    teacher: TrainedModel | None = None,
    tensorboard: bool = False,
    report: Report = print,
) -> TrainResult:
    """Train a configuration in a run folder, from its last checkpoint if there is one.

    All processes call it. teacher: of a student, whose configuration `distill.plan_chain` has made.
    report: called on process 0.

    Raises: ValueError for a configuration, data or a run folder that cannot be used; OSError for
    files that cannot be read or written; FloatingPointError where gradients are not finite.
    """
    session = open_session(config, workdir, teacher=teacher, tensorboard=tensorboard, report=report)
    return run(session)


# ------------------------------------------------------------------------------- the session


class MetricsWriter(Protocol):
    """A destination of metrics."""

    def write(self, step: int, **metrics: Any) -> None:
        """Write the metrics of a step."""
        ...


@dataclass
class Session:
    """A training run that is ready to start, on this process."""

    info: ModelInfo
    workdir: Path
    state: TrainState  # before the first step of this session, which reuses its memory
    training: ParallelTraining
    checkpoints: Checkpoints
    report: Report
    # Of a run that has done all of its steps, the rest is empty.
    batches: Iterator[Any] = field(default_factory=partial(iter, ()))
    held_out: Sequence[Any] = ()  # batches, placed
    damaged: AbstractSet[str] = frozenset()  # grows by what is wrong with each skipped example
    preview: Preview | None = None
    metrics: JsonlWriter | None = None  # on process 0
    board: TensorBoard | None = None  # on process 0, where asked for
    averages: StoredAverages | None = None  # with train.power_ema
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # of the run folder
    error: Exception | None = None  # that ended the batches

    @property
    def actions(self) -> tuple[PeriodicAction, ...]:
        """The periodic actions, in the order of their calls."""
        train = self.info.config.train
        return (
            PeriodicAction(train.eval_every, self.evaluate, "held-out loss"),
            PeriodicAction(train.preview_every, self.draw_preview, "preview"),
            PeriodicAction(train.save_every, self.save, "saving"),
            PeriodicAction(train.steps, self.wait, "saving"),
            PeriodicAction(train.steps, lambda state: self.draw_curve(), "loss curve"),
        )

    @property
    def options(self) -> LoopOptions:
        """The options of the training loop."""
        train = self.info.config.train
        return LoopOptions(
            train.steps, train.log_every, train.steps_per_dispatch, train.max_skipped
        )

    def readable_batches(self) -> Iterator[Any]:
        """The batches up to one that cannot be read, whose error is kept.

        Of several processes the others would go on, and wait for this one: here it is raised.
        """
        try:
            yield from self.batches
        except (UnreadableError, OSError) as error:
            if jax.process_count() > 1:
                raise
            self.error = error

    def step(self, state: TrainState, batches: Any) -> Any:
        """Train on this process's shares of batches [K, B, ...]: (state, metrics [K])."""
        return self.training.step(state, batches)

    def eval_step(self, params: Any, batch: Any) -> jax.Array:
        """The mean loss of a held-out batch."""
        return self.training.eval_step(params, batch)

    def log(self, step: int, **values: Any) -> None:
        """Write the metrics of a step."""
        writers: tuple[MetricsWriter | None, ...] = self.metrics, self.board
        for writer in writers:
            if writer is not None:
                writer.write(step, **values)

    def evaluate(self, state: TrainState) -> None:
        """Log the held-out loss of the first moving average."""
        losses = [float(self.eval_step(state.ema[0], batch)) for batch in self.held_out]
        self.log(int(state.step), held_out_loss=np.mean(losses))

    def draw_preview(self, state: TrainState) -> None:
        """Write a picture of samples of the first moving average."""
        if self.preview is None:
            return
        step = int(state.step)
        try:
            picture = self.preview(state.ema[0])
        except NotFiniteError as error:
            self.report(f"no preview of step {step}: {error}")
            return
        image_io.save_png(self.workdir / PREVIEWS / f"{step:07d}.png", picture)
        if self.board is not None:
            self.board.write_picture(step, "samples", np.asarray(picture.convert("RGB")))

    def save(self, state: TrainState) -> None:
        """Write a checkpoint in the background."""
        state = self.training.global_state(state)
        if self.averages is not None:  # first, so that no checkpoint is without them
            self.averages.save(state)
        self.checkpoints.save(int(state.step), state_to_trees(state), self.info.to_dict())

    def wait(self, state: TrainState) -> None:
        """Wait until every save is on disk."""
        if self.averages is not None:
            self.averages.wait()
        self.checkpoints.wait()

    def close(self) -> None:
        """Wait until every save is on disk, and release the folders."""
        try:
            if self.averages is not None:
                self.averages.close()
        finally:
            self.checkpoints.close()

    def draw_curve(self) -> None:
        """Write the picture of the losses, on process 0."""
        metrics, data = self.workdir / METRICS, self.info.config.data
        if jax.process_index() == 0 and metrics.exists():
            plot_curve(metrics, self.workdir / CURVE, f"{self.workdir.name}: {data}")

    def describe(self) -> str:
        """A sentence on the run: folder, steps, data, size and devices."""
        config, step = self.info.config, int(self.state.step)
        return (
            f"{'resuming' if step else 'training'} {self.workdir} at step {step} of"
            f" {config.train.steps}: {config.data},"
            f" {count_parameters(self.state.params):,} parameters, batch {config.train.batch},"
            f" {describe_devices()}, {config.network.dtype}"
        )


def run(session: Session) -> TrainResult:
    """Train a session to its last step, or to the first Ctrl-C or SIGTERM.

    Raises: FloatingPointError where too many steps in a row are skipped; ValueError for an example
    that cannot be read, after a save of the steps before it; OSError for files that cannot be read
    or written. The run can then be resumed from its last checkpoint.
    """
    with session.lock:
        start = int(session.state.step)
        if start < session.info.config.train.steps:
            session.report(session.describe())
            return _train(session, start)
        if not (session.workdir / CURVE).exists():  # the folder may be read-only
            session.draw_curve()
        return TrainResult("already_done", start)


def _train(session: Session, start: int) -> TrainResult:
    try:
        with catch_signals(jax.process_count()) as received:
            state = fit(
                session.step,
                session.state,
                session.readable_batches(),
                session.log,
                session.options,
                session.actions,
                received,
            )
            step = int(state.step)
            if start < step < session.options.steps:
                session.report(f"saving a checkpoint of step {step}")
                session.save(state)
            session.close()
    except (FloatingPointError, UnreadableError, SaveError):
        with contextlib.suppress(SaveError):
            session.close()
        raise
    finally:
        if session.board is not None:
            session.board.close()
    if session.damaged:
        example = min(session.damaged)
        session.report(f"{len(session.damaged)} damaged examples were skipped, as {example}")
    if session.error is not None:
        raise session.error
    if step < session.options.steps:
        return TrainResult("interrupted", step, received())
    return TrainResult("done", step)


def open_session(
    config: Config,
    workdir: Path,
    *,
    teacher: TrainedModel | None = None,
    tensorboard: bool = False,
    report: Report = print,
) -> Session:
    """Prepare a training run: its checkpoints, data, train state and compiled steps.

    Raises: ValueError or OSError as `train`.
    """
    report = report if jax.process_index() == 0 else _ignore
    check_run(config, workdir)
    with contextlib.ExitStack() as lock:
        session = _open(config, workdir, teacher, tensorboard, report, lock)
        session.lock = lock.pop_all()
    return session


def _open(
    config: Config,
    workdir: Path,
    teacher: TrainedModel | None,
    tensorboard: bool,
    report: Report,
    lock: contextlib.ExitStack,
) -> Session:
    checkpoints = resumed = None
    if (workdir / FOLDER).is_dir():
        checkpoints = _open_checkpoints(workdir, config, report, lock)
        resumed = resume(checkpoints, config, teacher, report)
    start = 0 if resumed is None else int(resumed.state.step)
    if resumed is not None and checkpoints is not None and start >= config.train.steps:
        training = _parallel(resumed.training, config, teacher)
        info = resumed.info._replace(config=config)
        return Session(info, workdir, resumed.state, training, checkpoints, report)
    dataset: Dataset = first_process_first("data", partial(load_data, config))
    info = _model_info(config, dataset, teacher)
    for sentence in (_describe_data(info, dataset), *dataset.notes, *_warm_up(config, start)):
        report(sentence)
    if resumed is not None:
        _check_same_data(workdir, resumed.info, info)
        conditioning = with_names(resumed.info.conditioning, info.conditioning)
        info = info._replace(conditioning=conditioning)
    batches, held_out = _batches(info, dataset, start), _held_out_batches(info, dataset)
    functions = _build(info, teacher) if resumed is None else resumed.training
    training = _parallel(functions, config, teacher)
    if resumed is None:
        state = training.init_state(config.train.seed)
    else:
        state = training.place_state(resumed.state)
    if checkpoints is None:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpoints = _open_checkpoints(workdir, config, report, lock)
        if checkpoints.steps():  # since this session looked for some
            raise ValueError(f"workdir is {workdir}, where another training has begun: start again")
    autoencoder = keep_autoencoder(info, workdir, teacher)
    session = Session(info, workdir, state, training, checkpoints, report, batches)
    if config.train.power_ema:
        session.averages = StoredAverages(workdir, config.train.power_ema, start)
    session.damaged = dataset.damaged
    session.held_out = [training.place_batch(batch) for batch in held_out]
    preview = None
    if config.train.preview_every:  # on all processes, so that an error ends all of them
        codec = codec_of(autoencoder)
        preview = make_preview(info, functions.network, dataset.held_out, codec)
    if jax.process_index() == 0:
        session.preview = preview
        session.metrics = JsonlWriter(workdir / METRICS, start)
        session.board = TensorBoard(workdir / TENSORBOARD, start) if tensorboard else None
    return session


def check_run(config: Config, workdir: Path) -> None:
    """Check a configuration, for the devices that there are, and its run folder.

    Raises: ValueError, naming the field.
    """
    config.check()
    network_name(config.network)  # checkpoints store it
    if workdir.is_file():
        raise ValueError(f"workdir is {workdir}, which is a file: use a folder")
    train = config.train
    parallel.check_divisible(train.batch, jax.device_count(), "train.batch", train.accumulate)


# ------------------------------------------------------------------------------- resuming


class Resumed(NamedTuple):
    """The checkpoint that a run resumes from."""

    info: ModelInfo  # as it was stored
    training: Training
    state: TrainState  # replicated over all devices of all processes


def stored_config(workdir: Path) -> Config:
    """The configuration of a run, as its latest readable checkpoint has it.

    Raises: FileNotFoundError for a folder without checkpoints; ValueError if all are damaged.
    """
    return ModelInfo.from_dict(latest_config(workdir)).config


def resume(
    checkpoints: Checkpoints,
    config: Config,
    teacher: TrainedModel | None = None,
    report: Report = print,
) -> Resumed | None:
    """The latest checkpoint that is not damaged, or None if there is none at all.

    Damaged ones after it are quarantined.

    Raises: ValueError if all are damaged, or for a configuration that cannot resume from it.
    """
    damaged: dict[int, ValueError] = {}
    for step in reversed(checkpoints.steps()):
        try:
            stored = checkpoints.config(step)
        except ValueError as error:
            damaged[step] = error
            continue
        info = ModelInfo.from_dict(stored)
        changes = check_resume(info.config, config)
        training = _build(info._replace(config=config), teacher)
        try:
            state = _restore(checkpoints, step, training, teacher)
        except ValueError as error:
            damaged[step] = error
            continue
        for later in damaged:
            place = checkpoints.quarantine(later)
            report(f"checkpoint {later} is damaged and was moved to {place}: step {step} is used")
        for change in changes:
            report(f"changed since the checkpoint: {change}")
        return Resumed(info, training, state)
    if damaged:
        raise damaged[max(damaged)]
    return None


def _restore(
    checkpoints: Checkpoints, step: int, training: Training, teacher: TrainedModel | None
) -> TrainState:
    extra_args = () if teacher is None else (teacher.params,)
    like = jax.eval_shape(training.init, jax.random.key(0), *extra_args)
    sharding = parallel.replicated(parallel.device_mesh())
    return state_from_trees(checkpoints.restore(step, state_to_trees(like), sharding), like)


def _check_same_data(workdir: Path, stored: ModelInfo, info: ModelInfo) -> None:
    if info.x_shape != stored.x_shape:
        raise ValueError(
            f"data has x of {info.x_shape}, and {workdir} was trained on {stored.x_shape}: use"
            " another run folder"
        )
    _check_same_latents(info, stored, f"{workdir}", "use the same latents, or another run folder")
    clause = difference(info.conditioning, stored.conditioning)
    if clause:
        raise ValueError(
            f"{clause}: use the data that {workdir} was trained on, or another run folder"
        )


# ------------------------------------------------------------------------------- parts


def _build(info: ModelInfo, teacher: TrainedModel | None) -> Training:
    return build_training(info) if teacher is None else build_distillation(info, teacher)


def _parallel(training: Training, config: Config, teacher: TrainedModel | None) -> ParallelTraining:
    return ParallelTraining(training, config.train, None if teacher is None else teacher.params)


def _open_checkpoints(
    workdir: Path, config: Config, report: Report, lock: contextlib.ExitStack
) -> Checkpoints:
    """The checkpoints of a run folder that is locked first."""
    _lock(workdir, report, lock)
    checkpoints = Checkpoints(workdir, config.train.keep, clean=True)
    if strays := checkpoints.strays():
        names = ", ".join(map(repr, strays))
        report(f"{workdir / FOLDER} has entries that are no checkpoints and are ignored: {names}")
    return checkpoints


def _lock(workdir: Path, report: Report, lock: contextlib.ExitStack) -> None:
    """Lock a run folder, on process 0; all processes learn how that ended."""
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            if taken := take_lock(workdir, report):
                lock.callback(taken.release)
        except (ValueError, OSError) as refused:
            error = refused
    if jax.process_count() > 1:
        is_refused = multihost_utils.broadcast_one_to_all(np.array(error is not None))
        if is_refused and error is None:
            error = ValueError(f"workdir is {workdir}, which process 0 could not lock")
    if error is not None:
        raise error


def _model_info(config: Config, dataset: Dataset, teacher: TrainedModel | None) -> ModelInfo:
    info = model_info(config, dataset)
    if teacher is None:
        return info
    _check_same_latents(info, teacher.info, teacher.name, "use its data")
    return student_info(info, teacher)


def _check_same_latents(info: ModelInfo, trained: ModelInfo, owner: str, remedy: str) -> None:
    if info.autoencoder != trained.autoencoder:
        ours, theirs = (each.autoencoder[:8] or "none" for each in (info, trained))
        raise ValueError(
            f"data has latents of the autoencoder {ours}, and {owner} was trained on those of"
            f" {theirs}: {remedy}"
        )


def _describe_data(info: ModelInfo, dataset: Dataset) -> str:
    """A sentence on the data: images, how many are held out, classes with their names."""
    names = info.conditioning.list_names()
    classes = str(info.conditioning) + (f" ({names})" if names else "")
    kind = "latents" if info.autoencoder else "images"
    return (
        f"{info.config.data}: {len(dataset.train)} {kind} of {info.describe_x()} to train on,"
        f" {len(dataset.held_out)} held out, {classes}"
    )


def _warm_up(config: Config, start: int) -> list[str]:
    """A sentence on a warm-up that takes a quarter of the steps or more; else none."""
    warmup, steps = config.train.warmup, config.train.steps
    if 4 * warmup < steps or start >= warmup:
        return []
    share = "all" if warmup >= steps else f"{warmup}"
    return [
        f"train.warmup is {warmup}: the learning rate rises for {share} of the {steps} steps, and"
        f" a short run wants fewer, as {steps // 10}"
    ]


def _batches(info: ModelInfo, dataset: Dataset, start: int) -> Iterator[Any]:
    """The training batches from step `start` on: the shares of this process."""
    config = info.config
    return batch_stream(
        dataset.train,
        config.train.batch,
        config.train.seed,
        start,
        conditioning=info.conditioning,
        flip=config.data.flip,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _held_out_batches(info: ModelInfo, dataset: Dataset) -> list[Any]:
    """The held-out batches, none without evaluation: the shares of this process."""
    train = info.config.train
    if not train.eval_every:
        return []
    if len(dataset.held_out) < jax.device_count():
        raise ValueError(
            f"train.eval_every is {train.eval_every}, and {len(dataset.held_out)} images are held"
            f" out for {jax.device_count()} devices: use 0, or fewer devices"
        )
    batches = first_batches(
        dataset.held_out,
        train.batch,
        jax.device_count(),
        HELD_OUT_BATCHES,
        conditioning=info.conditioning,
    )
    place = jax.process_index(), jax.process_count()
    return [parallel.process_slice(batch, *place) for batch in batches]


def _ignore(text: str) -> None:
    pass
