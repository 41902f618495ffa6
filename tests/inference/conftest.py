"""Models of a tiny network with random parameters: nothing is trained."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import build
from diffjax.config import Config, Data, Diffusion, Distillation, Train
from diffjax.data.codec import PIXELS
from diffjax.inference.model import TrainedModel
from diffjax.nn import registry
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Conditioning, Fields, Vector

UNDISTILLED = Distillation()
CONDITIONINGS = {
    "unconditional": UNCONDITIONAL,
    "label": ClassLabel(10),
    "fields": Fields((ClassLabel(4), Vector(3, "pose"))),
}


class TinyNetwork(nn.Module):
    width: int
    conditioning: Conditioning

    @nn.compact
    def __call__(self, x, t, condition, keys=None):
        time = jnp.stack([t / 1000, jnp.cos(t / 100)], axis=-1)
        embedding = nn.Dense(self.width)(time) + self.conditioning.embed(condition, self.width)
        hidden = nn.tanh(nn.Dense(self.width)(x) + embedding[:, None, None])
        return nn.Dense(x.shape[-1])(hidden)


@dataclasses.dataclass(frozen=True)
class TinyConfig(registry.NetworkConfig):
    width: int = 8

    def build(self, x_shape, conditioning):
        return TinyNetwork(self.width, conditioning)


@pytest.fixture(scope="session")
def tiny_model():
    """Build a model: tiny_model("fields", shape=(4, 4, 1), codec=..., dropout=0.1, seed=0)."""
    registry.register("tiny", TinyConfig)

    @functools.cache
    def make(
        kind="label", *, shape=(4, 4, 1), codec=None, dropout=0.1, averages=(0.999,), seed=0,
        distillation=UNDISTILLED,
    ):  # fmt: skip
        config = Config(
            data=Data(name="toys"),
            network=TinyConfig(),
            diffusion=Diffusion(T=100),
            train=Train(condition_dropout=dropout, ema=averages),
            distillation=distillation,
        )
        info = build.ModelInfo(config, shape, CONDITIONINGS[kind])
        module = build.build_module(info)
        return TrainedModel(
            name="tiny of toys",
            info=info,
            network=build.build_network(info, module),
            params=build.init_params(info, module, jax.random.key(seed)),
            parameterization=build.build_parameterization(config),
            schedule=build.build_schedule(config),
            codec=PIXELS if codec is None else codec,
            weights="ema",
            step=7,
        )

    return make


@pytest.fixture(scope="session")
def condition_of():
    """Conditions of each kind for a number of samples."""

    def make(kind, num):
        r = np.random.default_rng(3)
        labels = np.arange(num, dtype=np.int32)
        poses = r.normal(size=(num, 3)).astype(np.float32)
        return {
            "unconditional": None,
            "label": labels % 10,
            "fields": {"label": labels % 4, "pose": poses},
        }[kind]

    return make
