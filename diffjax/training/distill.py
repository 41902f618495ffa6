"""Distillation of a trained model: the chain of students, and their training.

Every stage is a run folder of its own, trained like any other run: it starts from the weights of
its teacher, the stage before it. A network that predicts eps cannot teach a student of few steps to
predict eps, which at the noisiest level determines nothing of x0; nor can its outputs be read as v.
So the first stage, "any", learns at all levels to predict v (or x0) from the teacher's estimates,
with guidance at any scale in one evaluation where that is asked for; the stages after it halve the
number of steps, or make the student consistent. Students of other teachers keep their prediction.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from diffjax import distillation
from diffjax.build import (
    ModelInfo,
    build_module,
    build_network,
    build_optimizer,
    build_parameterization,
    build_schedule,
    build_times,
    build_weighting,
    init_params,
)
from diffjax.checkpoint import FOLDER
from diffjax.config import Config, Data, Diffusion, Distillation, Train
from diffjax.denoiser import Condition, Denoiser, clip, condition_on, from_network
from diffjax.distillation import Rows
from diffjax.guidance import classifier_free_guidance
from diffjax.inference import guidance
from diffjax.inference.model import TrainedModel, describe_weights
from diffjax.loss import Objective, TimeSampling
from diffjax.nn.conditioning import difference, with_names
from diffjax.parameterization import Parameterization
from diffjax.schedule import Schedule, length
from diffjax.training.setup import Training
from diffjax.training.state import TrainState, init_state
from diffjax.training.step import QUARTILES, Metrics, make_eval_step, make_train_step, multi_step

ANY, CONSISTENCY = "any", "consistency"  # names of stages; the others are named by their steps
FOREIGN_LEARNING_RATE = 1e-4  # for a teacher of another library, whose own rate is not known
# Defaults of a student's training that do not come from its teacher's.
TRAIN_DEFAULTS: dict[str, Any] = {
    "steps": 2000, "warmup": 50, "decay": "cosine", "weighting": "truncated_snr",
    "times": "uniform", "times_mean": 0.0, "times_std": 1.0, "condition_dropout": 0.0,
    "ema": (0.999,), "power_ema": (), "eval_every": 1000, "preview_every": 1000, "save_every": 200,
}  # fmt: skip

# ------------------------------------------------------------------------------- methods


class Method(Protocol):
    """A method of distillation: the levels that a student learns, and its targets."""

    def rows(self, schedule: Schedule, steps: int) -> Rows:
        """The table [N] of levels of a student of so many steps, its own level first."""
        ...

    def target(self, student: Denoiser, teacher: Denoiser, x_t: Array, *row: Any) -> Array:
        """The target of the student's x0 at a row; student is its moving average."""
        ...


class Guidance:
    """The teacher's guided estimate in one evaluation (arXiv:2210.03142)."""

    def rows(self, schedule: Schedule, steps: int) -> Rows:
        """All levels."""
        return distillation.all_levels(schedule)

    def target(self, student: Denoiser, teacher: Denoiser, x_t: Array, *row: Any) -> Array:
        """The teacher's estimate."""
        (level,) = row
        return teacher(x_t, level)


class Progressive:
    """One DDIM step for two of the teacher's (arXiv:2202.00512)."""

    def rows(self, schedule: Schedule, steps: int) -> Rows:
        """The levels of the student's steps, and those of the teacher in between."""
        return distillation.halving_levels(schedule, steps)

    def target(self, student: Denoiser, teacher: Denoiser, x_t: Array, *row: Any) -> Array:
        """The x0 whose one step ends where the teacher's two end."""
        return distillation.progressive_target(teacher, x_t, *row)


class Consistency:
    """The end of the teacher's path, from every level (arXiv:2303.01469)."""

    def rows(self, schedule: Schedule, steps: int) -> Rows:
        """The levels of the teacher's steps, each with the next."""
        return distillation.adjacent_levels(schedule, steps)

    def target(self, student: Denoiser, teacher: Denoiser, x_t: Array, *row: Any) -> Array:
        """The student's own estimate one step of the teacher later."""
        return distillation.consistency_target(student, teacher, x_t, *row)


METHODS: dict[str, Method] = {
    "guidance": Guidance(), "progressive": Progressive(), "consistency": Consistency(),
}  # fmt: skip

# ------------------------------------------------------------------------------- the chain


@dataclass(frozen=True)
class DistillOptions:
    """Options of a chain of students."""

    method: Literal["progressive", "guidance", "consistency"] = "progressive"
    """Method of the last stage: progressive (halve the steps of DDIM repeatedly), guidance (only
    make guidance one evaluation), or consistency (learn the end of the teacher's path)."""
    guidance: float | None = None
    """Largest guidance scale of the students, which take any from 1; None for the
    teacher's, which is 1 (unguided) unless it is a student itself."""
    start: int = 64
    """Steps of DDIM at the start, from 2 to T: the first student halves them; for consistency, the
    student learns the end point of these steps."""
    end: int = 1
    """Steps of the last student of progressive distillation, from 1; halvings of the start lead to
    it."""
    prediction: Literal["v", "x0"] | None = None
    """Prediction of the students; None for the teacher's own, or v where that is eps."""
    data: Data = field(default_factory=Data)
    """Data of the students; the default is the teacher's, where it is recorded."""
    train: Train = field(default_factory=lambda: Train(**TRAIN_DEFAULTS))
    """Training of each student, twice as long for those of 2 and 1 steps. Other defaults are the
    teacher's, with a third of its learning rate."""


class Stage(NamedTuple):
    """A student of a chain."""

    name: str  # of its run folder
    config: Config


def default_options(options: DistillOptions, teacher: TrainedModel) -> DistillOptions:
    """The options with the teacher's data and, but for TRAIN_DEFAULTS, its training."""
    config = teacher.info.config
    rate = config.train.learning_rate / (3 if config.distillation.method == "none" else 1)
    if not config.data.known:
        rate = FOREIGN_LEARNING_RATE
    train = dataclasses.replace(config.train, **TRAIN_DEFAULTS | {"learning_rate": rate})
    return dataclasses.replace(options, data=config.data, train=train)


def plan_chain(options: DistillOptions, teacher: TrainedModel) -> list[Stage]:
    """The students of a chain, each the teacher of the next.

    Raises: ValueError for options that do not fit the teacher, as `validate`.
    """
    validate(options, teacher)
    stages = []
    if _needs_first_stage(options, teacher):
        stages.append(_stage(options, teacher, ANY, "guidance", 0, 0))
    if options.method == "consistency":
        start = options.start
        stages.append(_stage(options, teacher, CONSISTENCY, "consistency", start, start))
    elif options.method == "progressive":
        for steps in _halvings(options.start, options.end):
            stages.append(_stage(options, teacher, str(steps), "progressive", options.start, steps))
    return stages


def validate(options: DistillOptions, teacher: TrainedModel) -> None:
    """Check that a teacher can teach the students that are asked for.

    Raises: ValueError, naming the option that does not fit.
    """
    _validate_guidance(options, teacher)
    config = teacher.info.config
    if not options.data.known:
        raise ValueError(
            f"data.name is {options.data.name!r}: use the name of a data set, since"
            f" {teacher.name} does not record its own"
        )
    if options.method != "progressive" and options.end != 1:
        raise ValueError(
            f"end is {options.end} and method {options.method}: only method progressive has an end"
        )
    if options.train.condition_dropout:
        raise ValueError(
            f"train.condition_dropout is {options.train.condition_dropout}: use 0, since students"
            " learn with every condition"
        )
    if config.distillation.method == "consistency":
        raise ValueError(f"{teacher.name} is a consistency model: use its teacher")
    if config.distillation.steps and config.diffusion.prediction != _prediction(options, teacher):
        raise ValueError(
            f"prediction is {options.prediction}, and {teacher.name} predicts"
            f" {config.diffusion.prediction}, as its own students do: leave it out"
        )
    if options.method != "guidance":
        _validate_steps(options, teacher)


def _validate_guidance(options: DistillOptions, teacher: TrainedModel) -> None:
    learned, largest = teacher.info.config.distillation, _max_guidance(options, teacher)
    if learned.guidance_conditioned and largest != learned.guidance:
        raise ValueError(
            f"guidance is {largest:g}, and {teacher.name} was distilled for 1 to"
            f" {learned.guidance:g}: leave it out, or use its teacher"
        )
    if not 1 <= largest < math.inf:
        raise ValueError(
            f"guidance is {largest:g}: use more than 1, since students learn all scales up to it"
        )
    if not learned.guidance_conditioned:
        guidance.check_guidance(teacher, guidance.Guidance(largest))
    if options.method != "guidance":
        return
    if learned.guidance_conditioned:
        raise ValueError(
            f"method is guidance, and {teacher.name} computes guidance in one evaluation already:"
            " use another method"
        )
    if largest == 1:
        raise ValueError(
            f"method is guidance and guidance {largest:g}: use more than 1 for students of"
            f" {teacher.name}"
        )


def _validate_steps(options: DistillOptions, teacher: TrainedModel) -> None:
    start, end, T = options.start, options.end, length(teacher.schedule)
    steps = teacher.info.config.distillation.steps
    if not 2 <= start <= T:
        raise ValueError(f"start is {start}: use 2 to {T}, the number of levels of {teacher.name}")
    if steps not in (0, start):
        raise ValueError(
            f"start is {start}, and {teacher.name} was distilled for {steps} steps: use {steps}, or"
            " its teacher"
        )
    if options.method == "progressive" and _halvings(start, end)[-1:] != [end]:
        raise ValueError(
            f"start is {start} and end {end}: use numbers that one or more halvings connect, as 64"
            " and 1"
        )


def _max_guidance(options: DistillOptions, teacher: TrainedModel) -> float:
    default = teacher.info.config.distillation.guidance
    return default if options.guidance is None else options.guidance


def _prediction(options: DistillOptions, teacher: TrainedModel) -> str:
    own = teacher.info.config.diffusion.prediction
    return options.prediction or ("v" if own == "eps" else own)


def _needs_first_stage(options: DistillOptions, teacher: TrainedModel) -> bool:
    config = teacher.info.config
    learns_guidance = _max_guidance(options, teacher) > 1
    if learns_guidance and not config.distillation.guidance_conditioned:
        return True
    return config.diffusion.prediction != _prediction(options, teacher)


def _halvings(start: int, end: int) -> list[int]:
    """The numbers of steps start/2, start/4, ... down to `end` or to the last whole number."""
    steps = []
    while start % 2 == 0 and start > end >= 1:
        start //= 2
        steps.append(start)
    return steps


def _stage(
    options: DistillOptions, teacher: TrainedModel, name: str, method: Any, start: int, steps: int
) -> Stage:
    config = teacher.info.config
    # The last two halvings are the hardest, and get twice the steps (arXiv:2202.00512, appendix).
    train_steps = options.train.steps * (2 if steps in (1, 2) else 1)
    largest = _max_guidance(options, teacher)
    student = Config(
        data=options.data,
        network=dataclasses.replace(config.network, dropout=0.0),
        diffusion=_student_diffusion(options, teacher),
        train=dataclasses.replace(options.train, steps=train_steps),
        distillation=Distillation(method, "", start, steps, largest),
    )
    return Stage(name, student)


def _student_diffusion(options: DistillOptions, teacher: TrainedModel) -> Diffusion:
    own, prediction = teacher.info.config.diffusion, _prediction(options, teacher)
    changed: dict[str, Any] = {"prediction": prediction}
    if prediction != own.prediction:  # what belonged to the teacher's own
        changed["time_scale"] = Diffusion.time_scale
        if options.train.weighting != "edm":
            changed["sigma_data"] = Diffusion.sigma_data
    return dataclasses.replace(own, **changed)


def with_teacher(config: Config, teacher: TrainedModel) -> Config:
    """A student's configuration with the name and checksum of its teacher.

    A student whose teacher has changed cannot be resumed, since `check_resume` compares them.
    """
    name = f"{teacher.name}, {describe_weights(teacher)}"
    changed = dataclasses.replace(config.distillation, teacher=name)
    return dataclasses.replace(config, distillation=changed)


def check_workdir(workdir: Path) -> None:
    """Check that a folder can hold the run folders of students.

    Raises: ValueError for a file, or a run folder.
    """
    if workdir.is_file():
        raise ValueError(f"workdir is {workdir}, which is a file: use a folder")
    if (workdir / FOLDER).exists():
        raise ValueError(
            f"workdir is {workdir}, which is a run folder: use another, with the students in its"
            " sub-folders"
        )


# ------------------------------------------------------------------------------- training


def student_info(info: ModelInfo, teacher: TrainedModel) -> ModelInfo:
    """The description of a student: with its teacher's conditioning.

    A teacher of another library may have no null condition, where the data allows one.

    Raises: ValueError for data of another shape or with other conditions than the teacher's.
    """
    clause = difference(info.conditioning, teacher.info.conditioning)
    if clause or info.x_shape != teacher.info.x_shape:
        raise ValueError(
            f"data has x of {info.x_shape} and {info.conditioning}, and {teacher.name} was trained"
            f" on {teacher.info.x_shape} and {teacher.info.conditioning}: use its data"
            + (f" ({clause})" if clause else "")
        )
    return info._replace(conditioning=with_names(teacher.info.conditioning, info.conditioning))


def build_distillation(info: ModelInfo, teacher: TrainedModel) -> Training:
    """The functions that train a student, as `setup.build_training`.

    All of them take the teacher's parameters, which they only read, as one more argument.

    Raises: ValueError for parts that do not fit each other, or data that is not the teacher's.
    """
    info = student_info(info, teacher)
    trainer = StudentTrainer.build(info, teacher)
    return Training(
        trainer.module,
        trainer.objectives.network,
        trainer.init,
        multi_step(trainer.train_step),
        trainer.eval_step,
    )


@dataclass(frozen=True, eq=False)
class DistillationObjective:
    """The loss of a student, without its teacher's and its average's parameters."""

    network: Callable[..., Array]  # as `build.build_network` returns it
    parameterization: Parameterization
    method: Method
    rows: Rows
    weights: np.ndarray  # one per row
    times: TimeSampling
    max_guidance: float  # 1 where the student is not conditioned on a guidance scale
    teacher: TrainedModel

    def bind(self, teacher_params: Any, averaged_params: Any) -> Objective:
        """The objective of these parameters, which are held constant."""
        return distillation.distillation_loss(
            self.network,
            self.parameterization,
            self.rows,
            self.weights,
            partial(self.target, teacher_params, averaged_params),
            self.times,
            self.max_guidance,
        )

    def target(
        self,
        teacher_params: Any,
        averaged_params: Any,
        condition: Condition,
        x_t: Array,
        *row: Any,
    ) -> Array:
        """The target of the student's x0, from estimates that are clipped as in sampling."""
        conditional = from_network(self.network, averaged_params, self.parameterization)
        student = condition_on(conditional, condition)
        teacher = self.guided_teacher(teacher_params, condition)
        bounds = self.teacher.codec.bounds
        if bounds is not None:
            student, teacher = clip(student, *bounds), clip(teacher, *bounds)
        return self.method.target(student, teacher, x_t, *row)

    def guided_teacher(self, teacher_params: Any, condition: Condition) -> Denoiser:
        """The teacher's denoiser, at the guidance scale of the student's condition."""
        model = self.teacher
        conditional = from_network(model.network, teacher_params, model.parameterization)
        if self.max_guidance == 1 or model.info.config.distillation.guidance_conditioned:
            return condition_on(conditional, condition)
        base, scale = condition
        null = model.info.conditioning.null
        return classifier_free_guidance(conditional, base, null, scale[:, 0])


@dataclass(frozen=True, eq=False)
class StudentTrainer:
    """The steps of one device that train a student."""

    info: ModelInfo
    module: nn.Module
    objectives: DistillationObjective
    optimizer: optax.GradientTransformation
    rate: optax.Schedule

    @staticmethod
    def build(info: ModelInfo, teacher: TrainedModel) -> "StudentTrainer":
        """The trainer of a student.

        Raises: ValueError for parts that do not fit each other.
        """
        config, module = info.config, build_module(info)
        schedule, parameterization = build_schedule(config), build_parameterization(config)
        method = METHODS[config.distillation.method]
        rows = method.rows(schedule, config.distillation.steps)
        weights = build_weighting(config)(schedule, parameterization.prediction)
        objectives = DistillationObjective(
            build_network(info, module),
            parameterization,
            method,
            rows,
            weights[rows[0].t],
            build_times(config),
            config.distillation.guidance,
            teacher,
        )
        return StudentTrainer(info, module, objectives, *build_optimizer(config))

    def init(self, key: Array, teacher_params: Any) -> TrainState:
        """The state before the first step, with the teacher's parameters."""
        fresh = init_params(self.info, self.module, key)
        params = distillation.init_from_teacher(fresh, teacher_params)
        # Copies, since steps reuse the memory of their state and go on reading the teacher.
        params = jax.tree.map(partial(jnp.array, copy=True), params)
        return init_state(params, self.optimizer, self.info.config.train.averages)

    def train_step(
        self, state: TrainState, batch: Any, teacher_params: Any, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """One step, as `step.make_train_step`; the student's average is the first."""
        train = self.info.config.train
        step = make_train_step(
            self.objectives.bind(teacher_params, state.ema[0]),
            self.optimizer,
            train.ema,
            train.seed,
            power_lengths=train.power_ema,
            accumulate=train.accumulate,
            rate=self.rate,
            log_quartiles=len(self.objectives.weights) >= len(QUARTILES),
        )
        return step(state, batch, axis_name)

    def eval_step(
        self, params: Any, batch: Any, teacher_params: Any, axis_name: str | None = None
    ) -> Array:
        """The loss of one batch, as `step.make_eval_step`."""
        objective = self.objectives.bind(teacher_params, params)
        return make_eval_step(objective, self.info.config.train.seed)(params, batch, axis_name)
