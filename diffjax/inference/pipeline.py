"""Samples from a trained model, compiled once and run on all devices.

Another plan, condition, guidance scale or set of parameters does not compile again.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from diffjax import denoiser, sampler
from diffjax.build import ModelInfo
from diffjax.data.codec import Codec
from diffjax.data.image_io import to_uint8
from diffjax.denoiser import Condition, Denoiser, Network
from diffjax.devices import parallel
from diffjax.guidance import autoguidance, classifier_free_guidance, in_interval
from diffjax.inference.guidance import Guidance
from diffjax.inference.model import TrainedModel
from diffjax.parameterization import Parameterization
from diffjax.sampler import Carry, Plan

DECODED = 256  # images at a time, between x and uint8


class NotFiniteError(FloatingPointError):
    """Samples that contain NaN or infinity."""


# ------------------------------------------------------------------------------- denoisers


@dataclass(frozen=True)
class Clip:
    """Clip the estimate of x0 to the bounds of the model's codec, if it has any."""


@dataclass(frozen=True)
class DynamicThreshold:
    """Threshold the estimate of x0 dynamically."""

    quantile: float  # of the absolute values of x0, as 0.995


Bound = Clip | DynamicThreshold | None


def describe_bound(bound: Bound) -> str:
    """A short description, as in "clipped"."""
    if isinstance(bound, DynamicThreshold):
        return f"thresholded {bound.quantile:g}"
    return "unclipped" if bound is None else "clipped"


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance, without its scale and null, which are arguments."""

    rescale: float = 0.0
    batched: bool = True
    channels: int | None = None  # the first ones, which alone are guided; None for all


@dataclass(frozen=True)
class Autoguidance:
    """Autoguidance by another network, whose parameters and scale are arguments."""

    network: Network
    parameterization: Parameterization
    rescale: float = 0.0
    channels: int | None = None


class Replicated(NamedTuple):
    """The arguments of a compiled program that every device has a copy of."""

    params: Any
    guide_params: Any  # of the guide model; None without one
    scale: Any  # of guidance, float32
    null: Condition  # without a batch axis


class Sharded(NamedTuple):
    """The arguments of a compiled program that are split over devices, [B, ...] each."""

    condition: Condition
    inpaint: Any  # (known, mask), or None


@dataclass(frozen=True)
class DenoiserSpec:
    """The part of a denoiser that is compiled into a program: one program for each."""

    network: Network
    parameterization: Parameterization
    guidance: ClassifierFree | Autoguidance | None  # None: plainly conditional
    bound: DynamicThreshold | tuple[float, float] | None
    guidance_conditioned: bool  # the network takes (condition, scale)

    def build(
        self,
        shared: Replicated,
        own: Sharded,
        counted: Callable[[Network], Network] = lambda network: network,
    ) -> Denoiser:
        """The denoiser of these arguments.

        counted: wraps each network, to count its evaluations.
        """
        condition = own.condition
        if self.guidance_conditioned:
            batch = len(jax.tree.leaves(condition)[0])
            condition = condition, jnp.broadcast_to(shared.scale, (batch, 1))
        conditional = denoiser.from_network(
            counted(self.network), shared.params, self.parameterization
        )
        denoise = denoiser.condition_on(conditional, condition)
        if isinstance(self.guidance, ClassifierFree):
            denoise = classifier_free_guidance(
                conditional, condition, shared.null, shared.scale,
                self.guidance.rescale, self.guidance.batched, self.guidance.channels,
            )  # fmt: skip
        elif self.guidance is not None:
            worse = denoiser.from_network(
                counted(self.guidance.network),
                shared.guide_params,
                self.guidance.parameterization,
            )
            worse = denoiser.condition_on(worse, condition)
            rest = self.guidance.rescale, self.guidance.channels
            denoise = autoguidance(denoise, worse, shared.scale, *rest)
        if isinstance(self.bound, DynamicThreshold):
            denoise = denoiser.dynamic_threshold(denoise, self.bound.quantile)
        elif self.bound is not None:
            denoise = denoiser.clip(denoise, *self.bound)
        return denoise if own.inpaint is None else denoiser.inpaint(denoise, *own.inpaint)


# ------------------------------------------------------------------------------- requests


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for samples.

    Sample i is the same for any batch and any number of devices.
    """

    num: int
    batch: int  # samples at a time, over all devices; the last batch is padded
    seed: int
    condition: Condition = None  # a pytree [num, ...]
    guidance: Guidance = field(default_factory=Guidance)
    bound: Bound = field(default_factory=Clip)
    x: np.ndarray | None = None  # [num, ...] to start from, in place of noise
    inpaint: tuple[np.ndarray, np.ndarray] | None = None  # known x and mask, [num, ...] each
    decode: bool = True  # latents, as part of the time; False where only x is needed

    def check(self, x_shape: tuple[int, ...]) -> None:
        """Check that all arrays are for `num` samples of a model's shape.

        Raises: ValueError, naming the field.
        """
        if self.num < 1:
            raise ValueError(f"num is {self.num}: use 1 or more")
        for leaf in jax.tree.leaves(self.condition):
            if np.shape(leaf)[:1] != (self.num,):
                raise ValueError(
                    f"condition has shape {np.shape(leaf)}: use one for each of {self.num} samples"
                )
        known, mask = (None, None) if self.inpaint is None else self.inpaint
        expected = self.num, *x_shape
        for name, array in (("x", self.x), ("known x", known)):
            if array is not None and np.shape(array) != expected:
                raise ValueError(f"{name} has shape {np.shape(array)}: use {expected}")
        if mask is not None and np.shape(mask)[:1] != (self.num,):
            raise ValueError(
                f"mask has shape {np.shape(mask)}: use one for each of {self.num} samples"
            )


@dataclass(frozen=True)
class Hooks:
    """Functions that are called during sampling, and not timed as part of it."""

    progress: Callable[[int], Any] = lambda rows: None
    """Takes the number of the plan's rows that were done since the last call."""
    watch: Callable[[int, int, Array], Any] = lambda first, done, x0: None
    """Takes the index of the batch's first sample, the rows done of it, and its estimates of x0.

    The estimates are deleted when the next rows are run.
    """
    every: int | None = None
    """Number of rows at whose multiples both are called, at least."""


@dataclass(frozen=True)
class Samples:
    """Samples, and what they cost."""

    x: np.ndarray  # float32 [N, ...]: x0 of the model, or where else the plan ends
    condition: Condition  # [N, ...]
    nfe: int  # network evaluations per sample
    compile_seconds: float
    batch_seconds: tuple[float, ...]  # of each batch with its decoding, without compilation
    codec: Codec
    decoded: np.ndarray | None = None  # images of latents, uint8; None to decode x when asked

    @property
    def run_seconds(self) -> float:
        """Seconds of all batches."""
        return sum(self.batch_seconds)

    @cached_property
    def images(self) -> np.ndarray:
        """The samples decoded to images, uint8 [N, H, W, C]."""
        if self.decoded is not None:
            return self.decoded
        firsts = range(0, len(self.x), DECODED)  # float32 images of all take much memory
        parts = [to_uint8(self.codec.decode(self.x[i : i + DECODED])) for i in firsts]
        return np.concatenate(parts)


class Stopwatch:
    """Seconds that pass, without those inside of `paused`."""

    def __init__(self) -> None:
        """Start."""
        self._began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began


# ------------------------------------------------------------------------------- the pipeline


class Pipeline:
    """A model's compiled samplers, on all devices.

    Another plan, condition, guidance scale or set of parameters does not compile again.
    """

    def __init__(
        self,
        info: ModelInfo,
        network: Network,
        parameterization: Parameterization,
        codec: Codec,
        mesh: Mesh | None = None,
    ) -> None:
        """Nothing is compiled yet. mesh: the devices, all if None."""
        self._info, self._network, self._codec = info, network, codec
        self._parameterization = parameterization
        self._mesh = parallel.device_mesh() if mesh is None else mesh
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._evaluations: dict[Any, int] = {}  # of networks, by denoiser
        self._compile_seconds = 0.0
        self._decodes: set[int] = set()  # batches that the decoder is compiled for

    @staticmethod
    def for_model(model: TrainedModel) -> "Pipeline":
        """The pipeline of a trained model, on all devices."""
        return Pipeline(model.info, model.network, model.parameterization, model.codec)

    def __call__(
        self, params: Any, plan: Plan, request: Request, hooks: Hooks | None = None
    ) -> Samples:
        """Run a plan for the samples that are requested.

        Raises: ValueError for a batch that devices cannot share equally, a parameterization that
        is not usable at a level of the plan, a condition that the network does not know, or arrays
        that are not for the samples that are requested; NotFiniteError for samples that are not
        finite.
        """
        parallel.check_divisible(request.batch, len(self._mesh.devices))
        self._parameterization.check(plan.level)
        self._info.conditioning.check(request.condition)
        request.check(self._info.x_shape)
        specs, spec_index = self._specs(plan, request)
        shared = self._replicated(params, request)
        job = _Job(specs, spec_index, shared, plan, request, Hooks() if hooks is None else hooks)
        nfe, compiled, xs, seconds = self._count_nfe(job), self._compile_seconds, [], []
        decode, images = request.decode and bool(self._info.autoencoder), []
        if decode:
            self._compile_decoder(request.batch)
        for first in range(0, request.num, request.batch):
            x, batch_seconds = self._sample_batch(job, first)
            check_finite(x, plan.steps, first)
            xs.append(x)
            if decode:
                stopwatch = Stopwatch()
                images.append(to_uint8(self._codec.decode(x)))
                batch_seconds += stopwatch.seconds()
            seconds.append(batch_seconds)
        return Samples(
            x=np.concatenate(xs)[: request.num],
            condition=request.condition,
            nfe=nfe,
            compile_seconds=self._compile_seconds - compiled,
            batch_seconds=tuple(seconds),
            codec=self._codec,
            decoded=np.concatenate(images)[: request.num] if decode else None,
        )

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def lower(self, params: Any, rows: Plan, batch: int, guided: bool) -> Any:
        """Lower the program that runs rows of a plan for `batch` samples.

        Only shapes are needed, and it can be compiled for devices that are not here. params:
        arrays, or their ShapeDtypeStructs.
        """
        conditioning = self._info.conditioning
        shapes = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        null = jax.tree.map(lambda leaf: leaf[0], conditioning.nulls(1))
        shared = Replicated(params, None, scale, shapes(null))
        own = Sharded(shapes(conditioning.zeros(batch)), None)
        carry = (jax.ShapeDtypeStruct((batch, *self._info.x_shape), jnp.float32),) * 3
        keys = jax.eval_shape(lambda: sampler.image_keys(jax.random.key(0), np.arange(batch)))
        spec = self._spec(ClassifierFree() if guided else None, Clip())
        return self._jit_scan(spec).lower(shared, own, rows, carry, keys)

    def _spec(self, guidance: ClassifierFree | Autoguidance | None, bound: Bound) -> DenoiserSpec:
        return DenoiserSpec(
            self._network,
            self._parameterization,
            guidance,
            self._codec.bounds if isinstance(bound, Clip) else bound,
            self._info.config.distillation.guidance_conditioned,
        )

    def _specs(self, plan: Plan, request: Request) -> tuple[list[DenoiserSpec], np.ndarray]:
        """The plain denoiser and the guided one, and the index of the one of each row."""
        asked = request.guidance
        if asked.guide_model is not None:
            worse = asked.guide_model
            guided: Any = Autoguidance(
                worse.network, worse.parameterization, asked.rescale, asked.channels
            )
        else:
            guided = ClassifierFree(asked.rescale, asked.batched, asked.channels)
        specs = [self._spec(None, request.bound), self._spec(guided, request.bound)]
        possible = self._info.conditioning.is_conditional or asked.guide_model is not None
        is_guided = asked.scale != 1 and possible and not specs[0].guidance_conditioned
        inside = np.full(plan.steps, is_guided)
        if asked.interval is not None:
            inside &= in_interval(plan.level, *asked.interval)
        return specs, inside.astype(int)

    def _replicated(self, params: Any, request: Request) -> Replicated:
        conditioning, asked = self._info.conditioning, request.guidance
        if asked.negative is None:
            null = conditioning.nulls(1)
        else:
            null = conditioning.parse(asked.negative, 1)
        null = jax.tree.map(lambda leaf: leaf[0], null)
        guide_params = None if asked.guide_model is None else asked.guide_model.params
        shared = Replicated(params, guide_params, jnp.float32(asked.scale), null)
        return jax.block_until_ready(jax.device_put(shared, parallel.replicated(self._mesh)))

    def _sharded(self, request: Request, index: np.ndarray) -> Sharded:
        # The last batch is padded with samples from the start.
        own = jax.tree.map(
            lambda leaf: np.asarray(leaf)[index % request.num], (request.condition, request.inpaint)
        )
        return Sharded(*jax.device_put(own, parallel.batch_sharding(self._mesh)))

    def _count_nfe(self, job: "_Job") -> int:
        """Network evaluations per sample, counted by tracing each denoiser once."""
        batch = job.request.batch
        x = jax.ShapeDtypeStruct((batch, *self._info.x_shape), jnp.float32)
        own = self._sharded(job.request, np.arange(batch))
        total = 0
        for number, rows in enumerate(np.bincount(job.spec_index, minlength=len(job.specs))):
            if rows:
                spec = job.specs[number]
                key = spec, _signature((job.shared, own))
                if key not in self._evaluations:
                    build = partial(spec.build, job.shared, own)
                    self._evaluations[key] = sampler.count_evaluations(build, x)
                total += int(rows) * self._evaluations[key]
        return total

    def _compile_decoder(self, batch: int) -> None:
        """Decode a batch of zeros, once, whose seconds count as those of compilation."""
        if batch not in self._decodes:
            stopwatch = Stopwatch()
            self._codec.decode(np.zeros((batch, *self._info.x_shape), np.float32))
            self._compile_seconds += stopwatch.seconds()
            self._decodes.add(batch)

    def _sample_batch(self, job: "_Job", first: int) -> tuple[np.ndarray, float]:
        """x of one batch on the host, and the seconds that it took, without compilation."""
        plan, request = job.plan, job.request
        index = np.arange(first, first + request.batch)
        sharding = parallel.batch_sharding(self._mesh)
        keys = sampler.image_keys(jax.random.key(request.seed), index)
        keys, own = jax.device_put(keys, sharding), self._sharded(request, index)
        programs = [partial(self._scan, spec, job.shared, own) for spec in job.specs]
        every = job.hooks.every
        boundaries = () if every is None else sampler.every_rows(plan, every)
        compiled, stopwatch = self._compile_seconds, Stopwatch()
        if request.x is None:
            x = self._noise(keys, plan.init_noise_sigma)
        else:
            x = jax.device_put(np.asarray(request.x[index % request.num], np.float32), sharding)
        watcher = _Watcher(job.hooks, first, stopwatch)
        x = sampler.sample_switching(programs, job.spec_index, plan, x, keys, watcher, boundaries)
        x = jax.device_get(x)
        return x, stopwatch.seconds() - (self._compile_seconds - compiled)

    def _scan(
        self,
        spec: DenoiserSpec,
        shared: Replicated,
        own: Sharded,
        rows: Plan,
        carry: Carry,
        keys: Array,
    ) -> Carry:
        arguments = shared, own, rows, carry, keys
        return self._program(spec, partial(self._jit_scan, spec), arguments)(*arguments)

    def _noise(self, keys: Array, sigma: float) -> Array:
        scale = jax.device_put(jnp.float32(sigma), parallel.replicated(self._mesh))
        return self._program("noise", self._jit_noise, (keys, scale))(keys, scale)

    def _jit_scan(self, spec: DenoiserSpec) -> Any:
        # Explicitly per device, so that no sample leaves its own.
        def program(
            shared: Replicated, own: Sharded, rows: Plan, carry: Carry, keys: Array
        ) -> Carry:
            return sampler.scan_plan(spec.build(shared, own), rows, carry, keys)

        every_device, split = P(), P(parallel.AXIS)
        mapped = jax.shard_map(
            program,
            mesh=self._mesh,
            in_specs=(every_device, split, every_device, split, split),
            out_specs=split,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=3)

    def _jit_noise(self) -> Any:
        shape, sharding = self._info.x_shape, parallel.batch_sharding(self._mesh)
        return jax.jit(
            lambda keys, scale: scale * sampler.noise(keys, shape), out_shardings=sharding
        )

    def _program(
        self, name: Any, jit: Callable[[], Any], arguments: tuple[Any, ...]
    ) -> Callable[..., Any]:
        # Compiled ahead of time, so that compile time can be told from run time.
        key = name, _signature(arguments)
        if key not in self._programs:
            began = time.perf_counter()
            self._programs[key] = jit().lower(*arguments).compile()
            self._compile_seconds += time.perf_counter() - began
        return self._programs[key]


def check_finite(x: np.ndarray, steps: int, first: int) -> None:
    """Check samples [B, ...], or estimates of them. first: the index of the first one.

    Raises: NotFiniteError, with the index of one that contains NaN or infinity.
    """
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise NotFiniteError(
            f"sample {first + int(np.argmin(finite))} is not finite in {steps} steps: clip, or use"
            " another number of steps"
        )


class _Job(NamedTuple):
    """One call of a pipeline."""

    specs: list[DenoiserSpec]
    spec_index: np.ndarray  # of the denoiser that each row of the plan calls
    shared: Replicated
    plan: Plan
    request: Request
    hooks: Hooks


class _Watcher:
    """The callback of one batch, which calls the hooks while the stopwatch is paused."""

    def __init__(self, hooks: Hooks, first: int, stopwatch: Stopwatch) -> None:
        self._hooks, self._first, self._stopwatch, self._done = hooks, first, stopwatch, 0

    def __call__(self, rows: int, carry: Carry) -> None:
        # Waiting costs little with ten rows a call, and progress is then the truth.
        jax.block_until_ready(carry)
        self._done += rows
        with self._stopwatch.paused():
            self._hooks.progress(rows)
            self._hooks.watch(self._first, self._done, carry[1])


def _signature(arguments: Any) -> Any:
    """The tree, with what is absent in it, shapes and dtypes that a program takes."""
    leaves, tree = jax.tree.flatten(arguments)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def describe_devices() -> str:
    """Number and kind of all devices, as in "1 x cpu (2 cores)"."""
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {kind}" + (
        f" ({os.cpu_count()} cores)" if kind == "cpu" else ""
    )
