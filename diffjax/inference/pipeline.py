"""A trained run opened from its folder, and images from a network on all devices, timed."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from diffjax import denoiser, sampler, solvers
from diffjax.build import build_network, build_prediction, build_schedule, build_unet, params_like
from diffjax.checkpoint import ema_key, open_checkpoint, tree_sha256
from diffjax.config import SEEDS, Config, Distillation, config_from_dict, config_to_dict
from diffjax.data.image_io import to_uint8
from diffjax.denoiser import Denoiser, Network
from diffjax.devices import parallel
from diffjax.evaluation.results import SamplingRow
from diffjax.interop import unet2d
from diffjax.process import Prediction, check_prediction
from diffjax.sampler import Carry, Plan
from diffjax.schedule import Schedule, length, trailing


class ModelInfo(NamedTuple):
    """What is stored beside the weights: all that it takes to use them."""

    config: Config
    image_shape: tuple[int, int, int]
    classes: int  # 0: the network is not conditioned

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"config": config_to_dict(self.config)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "ModelInfo":
        """The inverse of `config_to_dict`."""
        return ModelInfo(config_from_dict(values["config"]), tuple(values["image_shape"]), values["classes"])


class TrainedModel(NamedTuple):
    """A trained network with the process that it was trained for."""

    name: str
    description: ModelInfo
    network: Network
    params: Any
    prediction: Prediction
    schedule: Schedule
    weights: str  # "ema" or a decay or "raw", "unknown" where a source does not tell
    step: int
    remarks: tuple[str, ...] = ()  # what is to be known of a network from elsewhere


def load_model(source: str | Path, step: int | None = None, weights: str = "ema") -> TrainedModel:
    """A run folder's network: checkpoint `step`, the latest if None; its moving average ("ema", or, of several, the
    decay of one, as "0.9999") or the parameters as trained ("raw"). Or "hf:FOLDER" or "hf:OWNER/NAME", a UNet2DModel of
    diffusers, with the weights that it has.

    FileNotFoundError where there is none, ValueError for other weights, or a network that the UNet here cannot be.
    """
    if unet2d.is_source(source):
        if weights not in ("ema", "raw"):
            raise ValueError(f"weights are {weights!r}: use ema or raw")
        if step is not None:
            raise ValueError(f"{source} holds one set of weights: leave out the checkpoint")
        run = _of_diffusers(unet2d.locate(source))
        if weights == "raw" and run.weights == "ema":
            raise ValueError(f"{source} holds a moving average, and no parameters as trained: leave out --weights raw")
        return run
    workdir = Path(source)
    checkpoints, step = open_checkpoint(workdir, step)
    description = ModelInfo.from_dict(checkpoints.config(step))
    config, image_shape, classes = description
    decays = [str(decay) for decay in config.train.ema]
    kept = {"ema": ema_key(0), "raw": "params"} | {decay: ema_key(i) for i, decay in enumerate(decays)}
    if weights not in kept:
        raise ValueError(f"weights are {weights!r}: use ema, raw, or the decay of an average, {' or '.join(decays)}")
    unet = build_unet(config, image_shape, classes)
    like = params_like(unet, image_shape)
    params = checkpoints.restore_weights(step, kept[weights], like, parallel.replicated(parallel.device_mesh()))
    checkpoints.close()
    name = workdir.resolve().name
    if config.distillation.method != "none":  # students are named by their steps, in a folder with a name
        name = f"{workdir.resolve().parent.name}/{name}"
    return TrainedModel(
        name=f"unet of {name}", description=description,
        network=build_network(config, unet), params=params,
        prediction=build_prediction(config), schedule=build_schedule(config),
        weights=weights, step=step,
    )  # fmt: skip


def _of_diffusers(folder: Path) -> TrainedModel:
    found = unet2d.load(folder)
    config = found.config
    unet = build_unet(config, found.image_shape, found.classes)
    params = jax.device_put(jax.device_get(found.params), parallel.replicated(parallel.device_mesh()))
    return TrainedModel(
        name=f"unet of {config.data}", description=ModelInfo(config, found.image_shape, found.classes),
        network=build_network(config, unet), params=params,
        prediction=build_prediction(config), schedule=build_schedule(config),
        weights=found.weights, step=found.step, remarks=found.remarks,
    )  # fmt: skip


def output_folder(source: str | Path) -> Path:
    """Where pictures of a run go: its folder, or runs/NAME for a source that is not ours to write to."""
    return (
        Path("runs") / Path(str(source).removeprefix(unet2d.PREFIX)).name if unet2d.is_source(source) else Path(source)
    )


class Guidance(NamedTuple):
    """How images are led to their labels, or away from a worse network."""

    scale: float = 1.0  # 0 unconditional (or the worse network), 1 conditional, more is guided
    interval: tuple[float, float] | None = None  # of sigma/alpha; outside it, conditional, without a second evaluation
    rescale: float = 0.0  # share by which the contrast of guided images is brought back
    negative: int | None = None  # a label to be led away from, instead of none
    two_passes: bool = False  # half the memory
    worse: TrainedModel | None = None  # autoguidance: a run to be led away from, instead of no label

    def __str__(self) -> str:
        """As in "2 in 0.3..5 rescaled 0.7"."""
        text = f"{self.scale:g}" + ("" if self.interval is None else " in {:g}..{:g}".format(*self.interval))
        text += f" rescaled {self.rescale:g}" if self.rescale else ""
        text += f" away from {self.negative}" if self.negative is not None else ""
        text += f" away from {self.worse.name} ({self.worse.weights}, step {self.worse.step})" if self.worse else ""
        return text + (" in two passes" if self.two_passes else "")


def check_guidance(run: TrainedModel, guidance: Guidance) -> None:
    """ValueError for guidance that a run cannot serve."""
    scale, interval, classes = guidance.scale, guidance.interval, run.description.classes
    worse, task = guidance.worse, run.description.config.distillation
    if task.told:
        if guidance._replace(scale=1.0) != Guidance():
            raise ValueError(f"{run.name} is told its guidance scale, in one pass: all that can be said is --guidance")
        if not 1 <= scale <= task.guidance:
            raise ValueError(f"guidance is {scale}: {run.name} was distilled for 1 to {task.guidance:g}")
        return
    if task.method != "none" and guidance != Guidance():
        raise ValueError(
            f"{run.name} was distilled without guidance: leave out --guidance, or distill its teacher with --guidance"
        )
    if not (np.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance is {scale}: use a number of 0 or more")
    if worse is None and guidance != Guidance() and not classes:
        raise ValueError(f"{run.name} was trained without labels: leave out --guidance")
    if scale == 1 and guidance != Guidance():
        raise ValueError(f"guidance {guidance} has the scale 1, which is not guided: give another --guidance")
    if worse is not None:
        _check_worse(run, worse)
        if guidance.negative is not None or guidance.two_passes:
            raise ValueError("a worse run is led away from in place of a label: leave out --negative and --two-passes")
    if guidance.negative is not None and not 0 <= guidance.negative < classes:
        raise ValueError(f"the label to be led away from is {guidance.negative}: use 0 to {classes - 1}")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(
            f"the interval is {interval[0]:g} to {interval[1]:g} of sigma/alpha: use 0 or more, its end above its start"
        )
    if not 0 <= guidance.rescale <= 1:
        raise ValueError(f"rescale is {guidance.rescale}: use 0 (not at all) to 1 (wholly)")
    if scale != 1 and worse is None and guidance.negative is None and run.description.config.train.label_dropout == 0:
        raise ValueError(
            f"{run.name} was trained with train.label_dropout 0, so it does not know images without a label:"
            " leave out --guidance, or train again with --train.label-dropout 0.1"
        )


def _check_worse(run: TrainedModel, worse: TrainedModel) -> None:
    if worse.description.config.distillation.method != "none":
        raise ValueError(f"{worse.name} is a student, which says other things than a network trained on data")
    ours, theirs = ((str(r.description.config.data), *r.description[1:]) for r in (run, worse))
    if ours != theirs:
        raise ValueError(
            f"{worse.name} was trained on data, images and classes {theirs}, and {run.name} on {ours}:"
            " autoguidance takes two networks of the same data"
        )
    if any(not np.array_equal(a, b) for a, b in zip(run.schedule, worse.schedule, strict=True)):
        raise ValueError(f"{worse.name} was trained on another schedule than {run.name}: autoguidance takes one")


def default_sampler(task: Distillation, levels: Schedule) -> tuple[str, int]:
    """By which sampler, in how many steps, a network is sampled if nothing else is asked for: a student as it was
    distilled to be, in two steps where it is consistent.
    """
    if task.method == "consistency":
        return "consistency", 1 if task.steps % 2 else 2  # the middle of an odd number of levels is none of them
    return "ddim", task.steps or min(50, length(levels))


def default_steps(task: Distillation, levels: Schedule, name: str) -> int:
    """In how many steps a network is sampled by a sampler of this name if nothing else is asked for: its usual ones,
    and by others DDPM in all T.
    """
    usual, steps = default_sampler(task, levels)
    T = length(levels)
    return steps if name == usual else T if name == "ddpm" else min(50, T)


def distillation_warning(run: TrainedModel, plan: Plan) -> str:
    """A sentence on a plan that a student was not distilled for, "" where there is nothing to say."""
    task = run.description.config.distillation
    if not task.steps:
        return ""
    t = trailing(run.schedule, task.steps)
    if task.method == "consistency":
        once = (np.diff(plan.level.t) < 0).all()
        meant, said = once and np.isin(plan.level.t, t).all(), f"consistency at some of {task.steps} levels"
        usual = solvers.consistency(run.schedule, plan.level.t) if meant else None
    else:
        usual, said = sampler.ddim(run.schedule, t), f"ddim in {task.steps} steps"
    same = usual is not None and usual.steps == plan.steps
    if same and all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(plan), jax.tree.leaves(usual), strict=True)):
        return ""
    return f"was distilled for {said}, trailing: another plan asks it for what it has not learned"


def require_undistilled(run: TrainedModel) -> None:
    """ValueError for a student of few steps, or with guidance in it, where what is asked for takes a network that knows
    every level, and what no guidance is.
    """
    task = run.description.config.distillation
    if task.steps or task.told:
        raise ValueError(f"{run.name} is a student, which knows only its own way to images: name its teacher")


def read_labels(run: TrainedModel, text: str, num: int) -> np.ndarray:
    """Labels as a user writes them, "3" or "0,1,2", repeated over `num` images: int32 [num]. ValueError for labels that
    the run does not know.
    """
    classes, labels = run.description.classes, text.split(",")
    if not classes:
        raise ValueError(f"{run.name} was trained without labels: leave out --labels")
    if not all(label.strip().isdecimal() and int(label) < classes for label in labels):
        raise ValueError(f"--labels is {text!r}: name labels of 0 to {classes - 1}, separated by commas")
    return np.resize(np.asarray(labels, np.int32), num)


def check_seed(seed: int) -> None:
    """ValueError for a seed that JAX would not take as it is."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed}: use 0 or more, and less than 2**32")


def describe_weights(run: TrainedModel) -> str:
    """Which they are, with a digest: a network trained anew in the same folder is another one."""
    return f"{run.weights}, step {run.step}, sha256:{tree_sha256(run.params)[:8]}"


def count_parameters(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class Samples(NamedTuple):
    """What a sampler made."""

    x: np.ndarray  # float32 [N, H, W, C]: images in [-1, 1], or where else the plan ends
    labels: np.ndarray  # int32 [N], -1 where the network has no classes
    nfe: int  # network evaluations per image
    compile_seconds: float
    batch_seconds: tuple[float, ...]  # of each batch, compilation apart

    @property
    def run_seconds(self) -> float:
        """Of all batches."""
        return sum(self.batch_seconds)

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, H, W, C]."""
        return to_uint8(self.x)


class Pipeline:
    """Images of one network, spread over all devices. Compiled programs are kept: another plan, label, scale or set of
    parameters does not compile again.
    """

    def __init__(
        self,
        network: Network,
        prediction: Prediction,
        image_shape: Sequence[int],
        classes: int,
        mesh: Mesh | None = None,
        told: bool = False,
    ) -> None:
        """classes: 0 for a network without a condition; else `classes` itself is its label for none. mesh: the devices,
        all if None. told: a student whose condition is a label and the guidance scale, in one pass.
        """
        self._network, self._prediction = network, prediction
        self._image_shape, self._classes = tuple(image_shape), classes
        self._mesh, self._told = parallel.device_mesh() if mesh is None else mesh, told
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._compile_seconds = 0.0

    @staticmethod
    def of(run: TrainedModel) -> "Pipeline":
        """For a run, on all devices."""
        told = run.description.config.distillation.told
        return Pipeline(run.network, run.prediction, *run.description[1:], told=told)

    def __call__(
        self,
        params: Any,
        plan: Plan,
        labels: np.ndarray | None,
        num: int,
        *,
        guidance: Guidance,
        seed: int,
        batch: int,
        clip: bool = True,
        threshold: float | None = None,
        x: np.ndarray | None = None,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        progress: Callable[[int], Any] = lambda rows: None,
        watch: Callable[[int, int, Array], Any] = lambda first, done, x0: None,
        every: int | None = None,
    ) -> Samples:
        """Sample `num` images in batches of `batch` (the last one filled up and cut).

        labels: int [num], `classes` for no label, or None for a network without classes; clip: estimates of x0 to
        [-1, 1]; threshold: dynamically, at this quantile, instead; x: where to start [num, ...], noise if None; known:
        images and mask [num, ...] as of `denoiser.inpaint`. Image i is the same for any batch and any number of
        devices.

        progress(rows) is called whenever rows of the plan are done, and watch(first, done, x0) with the index of the
        batch's first image, how many of its rows are done, and its estimates of x0, which are gone afterwards; every:
        at its multiples at least.
        ValueError for a batch that the devices cannot share equally.
        """
        parallel.check_divisible(batch, len(self._mesh.devices))
        check_prediction(self._prediction, plan.level)
        whole, split = parallel.replicated(self._mesh), parallel.batch_sharding(self._mesh)
        start_std = jax.device_put(jnp.float32(plan.start_std), whole)
        null = self._classes if guidance.negative is None else guidance.negative
        led = jnp.float32(guidance.scale), jnp.int32(null)
        worse = None if guidance.worse is None else guidance.worse.params
        shared = jax.block_until_ready(jax.device_put((params, worse, led), whole))
        key = jax.random.key(seed)
        before, made = self._compile_seconds, []
        seconds: list[float] = []
        led_at_all = guidance.scale != 1 and not self._told and (self._classes > 0 or guidance.worse is not None)
        inside = np.full(plan.steps, led_at_all)
        if guidance.interval is not None:
            inside &= sampler.within(plan, *guidance.interval)
        # What is compiled apart, plain and guided; numbers that may change without compiling are not in it.
        after = ("threshold", threshold) if threshold is not None else ("clip", None) if clip else ("", None)
        kinds: list[tuple[Any, ...]] = [(), ("guided", guidance.rescale, guidance.two_passes)]
        if guidance.worse is not None:
            kinds[1] = ("autoguided", guidance.rescale, guidance.worse.network, guidance.worse.prediction)

        def conditions(index: np.ndarray) -> Any:
            # Each image's label, and what is known of it. The last batch is filled up with images again.
            return jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf)[index % num], (labels, known)), split)

        shape = jax.ShapeDtypeStruct((batch, *self._image_shape), jnp.float32)
        some = conditions(np.arange(batch))
        nfe = sum(
            sampler.count_nfe(self._denoiser(shared, some, kind, after), plan, shape) * n // plan.steps
            for kind, n in zip(kinds, (int((~inside).sum()), int(inside.sum())), strict=True)
            if n
        )
        for first in range(0, num, batch):
            index = np.arange(first, first + batch)
            keys = jax.device_put(sampler.image_keys(key, index), split)
            its_conditions = conditions(index)

            def run(kind: Any, rows: Plan, carry: Carry, keys: Any, its: Any = its_conditions) -> Carry:
                arguments = shared, its, rows, carry, keys
                program = self._program((kind, after), lambda: self._build(kind, after), arguments)
                return program(*arguments)

            done, looking = 0, 0.0  # what is not sampling

            def look(rows: int, carry: Carry, first: int = first) -> None:
                # Waiting costs little with ten rows a call, and the bar tells the truth.
                jax.block_until_ready(carry)
                progress(rows)
                nonlocal done, looking
                done += rows
                began = time.perf_counter()
                watch(first, done, carry[1])
                looking += time.perf_counter() - began

            runs = [partial(run, kind) for kind in kinds]
            compiled, began = self._compile_seconds, time.perf_counter()
            if x is None:
                begin = self._program("noise", self._noise, (keys, start_std))(keys, start_std)
            else:
                begin = jax.device_put(np.asarray(x[index % num], np.float32), split)
            end = sampler.sample(runs, plan, begin, keys, look, every, which=inside.astype(int))
            made.append(jax.device_get(end))
            seconds.append(time.perf_counter() - began - (self._compile_seconds - compiled) - looking)
        shown = np.full(num, -1, np.int32) if labels is None else np.asarray(labels, np.int32)
        return Samples(np.concatenate(made)[:num], shown, nfe, self._compile_seconds - before, tuple(seconds))

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def lower(self, params: Any, rows: Plan, batch: int, guided: bool) -> Any:
        """The program that takes `batch` images through rows of a plan, clipped, guided or not, for shapes alone:
        params are arrays or what stands for them. It can be compiled where it cannot run.
        """
        scalar = partial(jax.ShapeDtypeStruct, ())
        shared = params, None, (scalar(jnp.float32), scalar(jnp.int32))
        labels = jax.ShapeDtypeStruct((batch,), jnp.int32) if self._classes else None
        carry = (jax.ShapeDtypeStruct((batch, *self._image_shape), jnp.float32),) * 3
        keys = jax.eval_shape(lambda: sampler.image_keys(jax.random.key(0), np.arange(batch)))
        program: Any = self._build(("guided", 0.0, False) if guided else (), ("clip", None))
        return program.lower(shared, (labels, None), rows, carry, keys)

    def _denoiser(self, shared: Any, conditions: Any, kind: Any, after: Any) -> Callable[..., Denoiser]:
        def build(counted: Callable[[Network], Network]) -> Denoiser:
            params, worse_params, (scale, null) = shared
            condition, known = conditions
            if self._told:
                condition = condition, jnp.broadcast_to(scale, (len(condition), 1))
            conditional = denoiser.from_network(counted(self._network), params, self._prediction)
            denoise = denoiser.condition_on(conditional, condition)
            if kind and kind[0] == "guided":
                denoise = denoiser.classifier_free_guidance(conditional, condition, null, scale, *kind[1:])
            elif kind:
                _, rescale, network, prediction = kind
                worse = denoiser.from_network(counted(network), worse_params, prediction)
                denoise = denoiser.autoguidance(denoise, denoiser.condition_on(worse, condition), scale, rescale)
            how, quantile = after
            if how == "threshold":
                denoise = denoiser.dynamic_threshold(denoise, quantile)
            elif how == "clip":
                denoise = denoiser.clip(denoise)
            return denoise if known is None else denoiser.inpaint(denoise, *known)

        return build

    def _build(self, kind: Any, after: Any) -> Callable[..., Any]:
        def program(shared: Any, conditions: Any, rows: Plan, carry: Carry, keys: Any) -> Carry:
            denoise = self._denoiser(shared, conditions, kind, after)(lambda network: network)
            return sampler.scan_plan(denoise, rows, carry, keys)

        # Explicitly per device: no image ever leaves the device that makes it.
        whole, split = P(), P(parallel.AXIS)
        sharded = jax.shard_map(
            program, mesh=self._mesh, in_specs=(whole, split, whole, split, split), out_specs=split, check_vma=False
        )
        return jax.jit(sharded, donate_argnums=3)

    def _noise(self) -> Callable[..., Any]:
        split = parallel.batch_sharding(self._mesh)
        return jax.jit(lambda keys, std: std * sampler.noise(keys, self._image_shape), out_shardings=split)

    def _program(self, name: Any, build: Callable[[], Any], arguments: tuple[Any, ...]) -> Callable[..., Any]:
        # Compiled ahead of time, so that compiling can be told from running. What is absent is part of the tree.
        leaves, tree = jax.tree.flatten(arguments)
        shapes = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if (name, shapes) not in self._programs:
            began = time.perf_counter()
            self._programs[name, shapes] = build().lower(*arguments).compile()
            self._compile_seconds += time.perf_counter() - began
        return self._programs[name, shapes]


def describe_devices() -> str:
    """As in "1 x cpu (2 cores)", the cores those of the machine."""
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {kind}" + (f" ({os.cpu_count()} cores)" if kind == "cpu" else "")


def sampling_row(
    run: TrainedModel, made: Samples, plan: Plan, sampler_name: str, guidance: Guidance, batch: int
) -> SamplingRow:
    """The row that describes what was made, with its whole context."""
    config, image_shape, _ = run.description
    return SamplingRow(
        sampler=sampler_name, steps=plan.steps, nfe=made.nfe, guidance=guidance.scale, guided=str(guidance),
        compile_seconds=made.compile_seconds, run_seconds=made.run_seconds, images=len(made.images), batch=batch,
        network=run.name, parameters=count_parameters(run.params), weights=f"{run.weights}, step {run.step}",
        image_size="x".join(map(str, image_shape)), device=describe_devices(), dtype=config.network.dtype,
    )  # fmt: skip
