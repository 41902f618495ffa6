"""Previews of a model in training, with the same seed and conditions each time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL.Image import Image

from diffjax.build import ModelInfo, build_parameterization, build_schedule
from diffjax.data import image_io
from diffjax.data.batches import first_examples
from diffjax.data.codec import PIXELS, Codec
from diffjax.denoiser import Condition, Network
from diffjax.devices import parallel
from diffjax.inference.defaults import default_sampler
from diffjax.inference.guidance import Guidance, can_be_guided
from diffjax.inference.pipeline import Pipeline, Request
from diffjax.inference.samplers import SamplerRequest, make_plan
from diffjax.nn.conditioning import Conditioning
from diffjax.sampler import Plan

GUIDANCE_SCALE, SEED, NUM, COLUMNS = 2.0, 0, 40, 10
Preview = Callable[[Any], Image]  # from parameters, replicated over all devices


@dataclass(frozen=True)
class SamplePreview:
    """A function from parameters to a grid of samples, on the devices of this process."""

    pipeline: Pipeline
    plan: Plan
    request: Request
    conditioning: Conditioning
    mesh: Mesh

    def __call__(self, params: Any) -> Image:
        """The grid, with a caption for each condition. params: replicated."""
        params = parallel.on_mesh(self.mesh, params)
        samples = self.pipeline(params, self.plan, self.request)
        captions = self.conditioning.describe(samples.condition)
        return image_io.grid(samples.images, captions, columns=COLUMNS)


@dataclass(frozen=True)
class ReconstructionPreview:
    """A function from an autoencoder's parameters to a grid of reconstructions."""

    network: Network
    images: np.ndarray  # [N, H, W, C]
    mesh: Mesh

    @cached_property
    def _reconstruct(self) -> Any:
        return jax.jit(lambda params, x: self.network(params, x, None, None))

    def __call__(self, params: Any) -> Image:
        """The grid: rows of images, each above its reconstructions. params: replicated."""
        params = parallel.on_mesh(self.mesh, params)
        both = self.images, np.asarray(self._reconstruct(params, self.images))
        num, titles = len(self.images), ("image", "reconstruction")
        rows = [each[i : i + COLUMNS] for i in range(0, num, COLUMNS) for each in both]
        shown = image_io.to_uint8(np.concatenate(rows))
        columns = min(COLUMNS, num)
        return image_io.grid(shown, columns=columns, titles=titles * (len(rows) // 2))


def make_preview(
    info: ModelInfo, network: Network, held_out: Any, codec: Codec = PIXELS
) -> Preview:
    """The preview of a model with its default sampler, guided where it can be.

    That of an autoencoder shows held-out images and their reconstructions. held_out: examples,
    whose conditions are used where conditions cannot be enumerated. codec: of x and images.
    """
    if info.config.is_autoencoder:
        mesh = parallel.device_mesh(jax.local_devices())
        num = min(NUM // 2, len(held_out)) // COLUMNS * COLUMNS or len(held_out)
        return ReconstructionPreview(network, first_examples(held_out, num)[0], mesh)
    return make_sample_preview(info, network, held_out, codec)


def make_sample_preview(
    info: ModelInfo, network: Network, held_out: Any, codec: Codec
) -> SamplePreview:
    """The preview of a diffusion model, as `make_preview`."""
    config, mesh = info.config, parallel.device_mesh(jax.local_devices())
    schedule = build_schedule(config)
    name, steps = default_sampler(config.distillation, schedule)
    plan, _ = make_plan(SamplerRequest(name), schedule, steps)
    pipeline = Pipeline(info, network, build_parameterization(config), codec, mesh)
    num, condition = preview_conditions(info.conditioning, held_out)
    scale = GUIDANCE_SCALE if can_be_guided(info) else config.distillation.guidance
    batch = parallel.round_up(num, mesh.size)
    request = Request(
        num=num, batch=batch, seed=SEED, condition=condition, guidance=Guidance(scale)
    )
    return SamplePreview(pipeline, plan, request, info.conditioning, mesh)


def preview_conditions(conditioning: Conditioning, held_out: Any) -> tuple[int, Condition]:
    """The number of preview samples, and their conditions, spread where possible.

    Else they are those of the first held-out examples.
    """
    try:
        return NUM, conditioning.spread(NUM)
    except ValueError:  # numbers cannot be enumerated
        num = min(NUM, len(held_out))
        return num, first_examples(held_out, num, conditioning)[1]
