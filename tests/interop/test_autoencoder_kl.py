"""AutoencoderKL folders: names, sizes, fields and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from diffjax.interop import autoencoder_kl, hub
from diffjax.interop.layers import to_tensors
from diffjax.nn.autoencoder import AutoencoderConfig
from diffjax.nn.conditioning import UNCONDITIONAL
from diffjax.nn.registry import abstract_params
from tests.interop.test_unet2d import edit

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = AutoencoderConfig(
    channels=(4, 8), blocks=1, latent_channels=2, norm_groups=2, scaling=0.3, shift=0.25
)


def make_params(config, channels=3, seed=0):
    shape = (config.factor, config.factor, channels)
    like = abstract_params(config.build(shape), shape, UNCONDITIONAL)
    r = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * r.normal(size=leaf.shape)).astype(np.float32), like)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of diffusers, which tests copy."""
    folder = tmp_path_factory.mktemp("saved") / "vae"
    autoencoder_kl.save(folder, CONFIG, make_params(CONFIG))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A folder of diffusers."""
    return Path(shutil.copytree(saved, tmp_path / "vae"))


def resnet(name, inside, outside):
    found = {f"{name}.norm1": (inside,), f"{name}.conv1": (outside, inside, 3, 3)}
    found |= {f"{name}.norm2": (outside,), f"{name}.conv2": (outside, outside, 3, 3)}
    shortcut = {f"{name}.conv_shortcut": (outside, inside, 1, 1)}
    return found | (shortcut if inside != outside else {})


def published_layers(widths, blocks, latents, channels):
    """The layers of diffusers' AutoencoderKL, written down from its source."""

    def middle(name, width):
        names = ("to_q", "to_k", "to_v", "to_out.0")
        attention = f"{name}.attentions.0"
        found = {f"{attention}.group_norm": (width,)}
        found |= {f"{attention}.{each}": (width, width) for each in names}
        return found | {
            key: shape for i in (0, 1)
            for key, shape in resnet(f"{name}.resnets.{i}", width, width).items()
        }  # fmt: skip

    found = {
        "encoder.conv_in": (widths[0], channels, 3, 3),
        "encoder.conv_norm_out": (widths[-1],),
        "encoder.conv_out": (2 * latents, widths[-1], 3, 3),
        "decoder.conv_in": (widths[-1], latents, 3, 3),
        "decoder.conv_norm_out": (widths[0],),
        "decoder.conv_out": (channels, widths[0], 3, 3),
        "quant_conv": (2 * latents, 2 * latents, 1, 1),
        "post_quant_conv": (latents, latents, 1, 1),
        **middle("encoder.mid_block", widths[-1]),
        **middle("decoder.mid_block", widths[-1]),
    }
    inside, last = widths[0], len(widths) - 1
    for i, width in enumerate(widths):
        for j in range(blocks):
            found |= resnet(f"encoder.down_blocks.{i}.resnets.{j}", inside, width)
            inside = width
        if i < last:
            found[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = (width, width, 3, 3)
    for i, width in enumerate(widths[::-1]):
        for j in range(blocks + 1):
            found |= resnet(f"decoder.up_blocks.{i}.resnets.{j}", inside, width)
            inside = width
        if i < last:
            found[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = (width, width, 3, 3)
    return found


def with_biases(layers):
    weights = {f"{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers.items()}


def test_published_names(folder):
    shapes = {name: value.shape for name, value in load_file(folder / WEIGHTS).items()}
    assert shapes == with_biases(published_layers((4, 8), 1, 2, 3))


def test_counts_of_stable_diffusion():
    """248 tensors, 83,653,863 numbers; without a number of them being made."""
    config = AutoencoderConfig()
    like = abstract_params(config.build((8, 8, 3)), (8, 8, 3), UNCONDITIONAL)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)
    tensors = dict(to_tensors(zeros, lambda keys: autoencoder_kl._stored(keys, 4)))
    assert len(tensors) == 248
    assert sum(np.prod(value.shape) for value in tensors.values()) == 83_653_863
    expected = with_biases(published_layers((128, 256, 512, 512), 2, 4, 3))
    assert {name: value.shape for name, value in tensors.items()} == expected


configs = st.builds(
    AutoencoderConfig,
    channels=st.sampled_from([(4,), (4, 8), (4, 4, 8)]),
    blocks=st.integers(1, 2),
    latent_channels=st.integers(1, 3),
    norm_groups=st.sampled_from([1, 2, 4]),
    middle_attention=st.booleans(),
    quant_conv=st.booleans(),
    post_quant_conv=st.booleans(),
    scaling=st.floats(0.1, 2),
    shift=st.sampled_from([0.0, 0.5]),
)


@settings(max_examples=4)
@given(configs, st.sampled_from([1, 3]))
def test_here_and_back(tmp_path_factory, config, channels):
    folder, params = tmp_path_factory.mktemp("folder"), make_params(config, channels)
    autoencoder_kl.save(folder, config, params)
    found, again = autoencoder_kl.load(folder)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_old_files(folder):
    """Names of 2022, attention as convolutions of 1x1, and no scaling_factor: 0.18215."""
    path, tensors = folder / "config.json", load_file(folder / WEIGHTS)
    config = json.loads(path.read_text())
    for name in ("scaling_factor", "shift_factor", "use_quant_conv", "mid_block_add_attention"):
        del config[name]
    path.write_text(json.dumps(config))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, before in old.items():
        for part in ("encoder", "decoder"):
            name = f"{part}.mid_block.attentions.0."
            tensors[f"{name}{before}.bias"] = tensors.pop(f"{name}{now}.bias")
            kernel = tensors.pop(f"{name}{now}.weight")
            tensors[f"{name}{before}.weight"] = kernel[:, :, None, None]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    found, params = autoencoder_kl.load(folder)
    assert found == dataclasses.replace(CONFIG, scaling=0.18215, shift=0.0)
    jax.tree.map(np.testing.assert_array_equal, params, make_params(CONFIG))


MISTAKES = [
    ({"_class_name": "VQModel"}, ["VQModel", "AutoencoderKL"]),
    ({"act_fn": "gelu"}, ["act_fn", "gelu", "silu"]),
    ({"latents_mean": [0.1, 0.2]}, ["latents_mean", [0.1, 0.2]]),
    ({"latents_std": [0.1, 0.2]}, ["latents_std", [0.1, 0.2]]),
    ({"down_block_types": ["DownEncoderBlock2D"]}, ["down_block_types", "DownEncoderBlock2D"]),
    ({"up_block_types": ["UpDecoderBlock2D", "Other"]}, ["up_block_types", "Other"]),
    ({"norm_num_groups": 3}, ["norm_num_groups", 3, [4, 8]]),
    ({"out_channels": 4}, ["out_channels", 4, 3]),
    ({"scaling_factor": 0}, ["scaling_factor", 0]),
    ({"temporal_compression": 4}, ["temporal_compression", 4]),
    ({"use_quant_conv": False}, [WEIGHTS, "quant_conv.bias"]),
    ({"mid_block_add_attention": False}, [WEIGHTS, "mid_block.attentions.0"]),
    ({"layers_per_block": 2}, [WEIGHTS, "resnets.1"]),
    ({"latent_channels": 3}, [WEIGHTS, (4,), (6,)]),
]


@pytest.mark.parametrize(("fields", "names"), MISTAKES)
def test_autoencoders_that_do_not_fit(folder, fields, names):
    edit(folder, "config.json", **fields)
    with pytest.raises(ValueError, match=naming(*names)):
        autoencoder_kl.load(folder)


def test_an_autoencoder_that_diffusers_does_not_have(tmp_path):
    config = dataclasses.replace(CONFIG, norm_epsilon=1e-5)
    with pytest.raises(ValueError, match=naming("norm_epsilon", 1e-05, "diffusers")):
        autoencoder_kl.save(tmp_path, config, {})


def test_a_folder_of_an_autoencoder_alone(folder):
    """It is a model of images of the size of its config.json, 32 where that has none."""
    found = hub.load(folder)
    assert found.info.config.network == CONFIG
    assert found.info.x_shape == (32, 32, 3)
    found.info.config.check()
    edit(folder, "config.json", sample_size=64)
    assert hub.load(folder).info.x_shape == (64, 64, 3)
