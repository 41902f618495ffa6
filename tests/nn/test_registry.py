import dataclasses
import importlib
import json
import sys

import jax
import numpy as np
import pytest
from helpers import naming

from diffjax.build import ModelInfo, abstract_params, build_module, build_network, init_params
from diffjax.config import Config, check_resume, config_from_dict, config_to_dict, is_bound
from diffjax.nn import registry
from diffjax.nn.conditioning import ClassLabel
from diffjax.nn.registry import NetworkConfig, network_class, network_name
from diffjax.nn.unet import UNetConfig

MODULE = """
from dataclasses import dataclass

import flax.linen as nn

from diffjax.nn.registry import NetworkConfig


class Affine(nn.Module):
    channels: int
    conditioning: object

    @nn.compact
    def __call__(self, x, t, condition=None, keys=None):
        embedding = self.conditioning.embed(condition, self.channels)
        return nn.Dense(self.channels, name="out")(x) + embedding[:, None, None]


@dataclass(frozen=True)
class AffineConfig(NetworkConfig):
    depth: int = 1

    def build(self, x_shape, conditioning):
        return Affine(x_shape[-1] * (2 if self.learned_variance else 1), conditioning)
"""


@pytest.fixture
def affine(tmp_path, monkeypatch):
    """The config class of a network in another, installed package."""
    (tmp_path / "affine_package.py").write_text(MODULE)
    folder = tmp_path / "affine_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: affine_package\nVersion: 1.0\n")
    entry = "[diffjax.networks]\naffine = affine_package:AffineConfig\n"
    (folder / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))
    importlib.invalidate_caches()
    yield importlib.import_module("affine_package").AffineConfig
    del sys.modules["affine_package"]


def test_network_of_another_package(affine):
    assert network_class("affine") is affine
    assert network_name(affine()) == "affine"


def test_name_of_a_config_that_was_imported_first(affine):
    assert network_name(affine(depth=2)) == "affine"
    assert registry.NETWORKS["affine"] is affine


def test_config_round_trip(affine):
    config = Config(network=affine(depth=3, dtype="bfloat16"))
    stored = json.loads(json.dumps(config_to_dict(config)))
    assert stored["network"]["kind"] == "affine"
    assert config_from_dict(stored) == config


@pytest.mark.parametrize("learned_variance", [False, True])
def test_network_is_built(affine, learned_variance):
    config = Config(network=affine(learned_variance=learned_variance))
    info = ModelInfo(config, (4, 6, 3), ClassLabel(5))
    module = build_module(info)
    params = init_params(info, module, jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    like = abstract_params(info, module)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, like)
    x, labels = np.ones((2, 4, 6, 3), np.float32), np.array([0, 5])
    assert build_network(info, module)(params, x, np.zeros(2), labels).shape == x.shape


def test_resume_with_another_network(affine):
    with pytest.raises(ValueError, match=naming("network", "AffineConfig", "UNetConfig")):
        check_resume(Config(), Config(network=affine()))
    stored = Config(network=affine())
    with pytest.raises(ValueError, match=naming("network.depth", 2, 1)):
        check_resume(stored, Config(network=affine(depth=2)))
    assert check_resume(stored, Config(network=affine(remat=True))) == [
        "network.remat: False -> True"
    ]


def test_unknown_network():
    with pytest.raises(ValueError, match=naming("mixer", "unet", "diffjax.networks")):
        network_class("mixer")
    stored = config_to_dict(Config())
    stored["network"]["kind"] = "mixer"
    with pytest.raises(ValueError, match=naming("mixer", "unet")):
        config_from_dict(stored)


def test_unregistered_config():
    @dataclasses.dataclass(frozen=True)
    class Other(NetworkConfig):
        pass

    with pytest.raises(ValueError, match=naming("Other", "register")):
        network_name(Other())


def test_unet_is_registered():
    assert network_class("unet") is UNetConfig
    assert network_name(UNetConfig(channels=4)) == "unet"


def test_bound_fields():
    assert is_bound("network.channels")
    assert not is_bound("network.dropout")
    assert is_bound("data.conditions")
    assert not is_bound("train.steps")
