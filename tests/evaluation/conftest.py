"""Models of digits with a network of a few operations: nothing is trained."""

import jax
import jax.numpy as jnp
import pytest

from diffjax import build
from diffjax.config import Config, Data, Diffusion, Distillation, Train
from diffjax.data.codec import PIXELS
from diffjax.evaluation.results import QualityRow
from diffjax.inference.model import TrainedModel
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Fields, Vector

CONDITIONINGS = {
    "unconditional": UNCONDITIONAL,
    "label": ClassLabel(10),
    "fields": Fields((ClassLabel(10), Vector(2, "pose"))),
}


def network(params, x, t, condition, keys=None):
    """A network of a few operations, which compiles at once; its condition shifts the output."""
    shift = 0.0
    for leaf in jax.tree.leaves(condition):
        shift += params["shift"] * jnp.cos(leaf.reshape(len(x), -1).sum(1)).reshape(-1, 1, 1, 1)
    mixed = x + 0.2 * jnp.roll(x, 1, axis=1) + shift + 1e-3 * t.reshape(-1, 1, 1, 1)
    return params["scale"] * jnp.tanh(mixed)


@pytest.fixture(scope="session")
def digits_model():
    """Build a model: digits_model("fields", dropout=0.0, distillation=..., name=...)."""

    def make(kind="label", *, dropout=0.1, distillation=None, name="unet of x"):
        config = Config(
            data=Data(name="digits"),
            diffusion=Diffusion(T=100),
            train=Train(condition_dropout=dropout),
            distillation=distillation or Distillation(),
        )
        info = build.ModelInfo(config, (8, 8, 1), CONDITIONINGS[kind])
        return TrainedModel(
            name=name,
            info=info,
            network=network,
            params={"scale": jnp.full((8, 8, 1), 0.5), "shift": jnp.float32(0.3)},
            parameterization=build.build_parameterization(config),
            schedule=build.build_schedule(config),
            codec=PIXELS,
            weights="ema",
            step=7,
        )

    return make


@pytest.fixture(scope="session")
def quality_row():
    """A complete row."""
    return QualityRow(
        network="unet of x", parameters=1234, weights="ema, step 7", image_size="8x8x1",
        device="1 x cpu", dtype="float32", versions="jax 1", sampler="ddim(eta=0, trailing)",
        clipping="clipped", steps=50, guidance=2.0, guided="2", images=500, batch=100, seed=0,
        extractor="cnn-64, 98% on held-out", reference="digits, train, 1,597 images",
        fd=3.25, kd=0.01, kd_error=0.002, inception_score=8.5, precision=0.75, recall=0.5,
        class_accuracy=0.991, real_class_accuracy=0.976, nfe=100, ms_per_image=1.5, spread=0.03,
        batches=5, compile_seconds=0.5,
    )  # fmt: skip
