"""DiT as diffusers and Meta store it: names, sizes, values and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import naming
from safetensors.numpy import load_file, save_file

from diffjax import denoiser, sampler
from diffjax.build import (
    ModelInfo,
    abstract_params,
    build_module,
    build_network,
    build_parameterization,
    build_schedule,
)
from diffjax.config import Config, Diffusion
from diffjax.interop import dit, hub
from diffjax.interop.files import Weights
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel
from diffjax.nn.dit import SIZES, DiTConfig, positions
from diffjax.nn.dit import dit as size_of_paper
from diffjax.testing import run_plan
from tests.interop.test_torch_file import save, stored
from tests.interop.test_unet2d import edit, make_params

WEIGHTS = "diffusion_pytorch_model.safetensors"
NETWORK = DiTConfig(
    width=8, depth=3, heads=2, frequency_shift=1.0, mlp_norm_epsilon=1e-5, learned_variance=True
)
INFO = ModelInfo(Config(network=NETWORK), (4, 4, 3), ClassLabel(2, names=("cat", "dog")))


def zeros_like_params(info):
    """Parameters of zeros that take no memory."""
    like = abstract_params(info, build_module(info))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), like)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of diffusers, which tests copy."""
    folder = tmp_path_factory.mktemp("saved") / "theirs"
    hub.save(folder, INFO, make_params(INFO), "ema", 7)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A folder of diffusers."""
    return Path(shutil.copytree(saved, tmp_path / "theirs"))


# ----------------------------------------------------------------------------- diffusers


def published_layers(width, depth, inside, outside, patch, rows):
    """The layers of diffusers' DiTTransformer2DModel, written down from its source."""
    found = {
        "pos_embed.proj": (width, inside, patch, patch),
        "proj_out_1": (2 * width, width),
        "proj_out_2": (patch * patch * outside, width),
    }
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        emb = f"{block}norm1.emb."
        found |= {
            f"{emb}timestep_embedder.linear_1": (width, 256),
            f"{emb}timestep_embedder.linear_2": (width, width),
            f"{emb}class_embedder.embedding_table": (rows, width),
            f"{block}norm1.linear": (6 * width, width),
            **{f"{block}attn1.{n}": (width, width) for n in ("to_q", "to_k", "to_v", "to_out.0")},
            f"{block}ff.net.0.proj": (4 * width, width),
            f"{block}ff.net.2": (width, 4 * width),
        }
    return found


def test_published_names(folder):
    tensors = load_file(folder / WEIGHTS)
    layers = published_layers(8, 3, 3, 6, 2, 3)
    expected = {f"{name}.weight": shape for name, shape in layers.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in layers.items() if "table" not in name}
    assert {name: value.shape for name, value in tensors.items()} == expected


@pytest.mark.parametrize(
    ("size", "tensors", "unique"),
    [
        ("S", 234, 32_865_056),
        ("B", 234, 130_315_808),
        ("L", 462, 457_840_672),
        ("XL", 538, 674_834_720),
    ],
)
def test_counts_of_published_files(size, tensors, unique):
    """The embedders stand in every block of a file: 749,826,464 numbers of XL/2 in all."""
    network = size_of_paper(
        size, 2, learned_variance=True, frequency_shift=1.0, mlp_norm_epsilon=1e-5
    )
    info = ModelInfo(Config(network=network), (32, 32, 4), ClassLabel(1000))
    params = zeros_like_params(info)
    part = dit.write(info, params)
    assert len(part.tensors) == tensors
    numbers = sum(np.prod(value.shape) for value in part.tensors.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == unique
    copies = network.depth - 1
    width = network.width
    assert numbers == unique + copies * (1257 * width + width + width**2 + width)
    if size == "XL":
        assert numbers == 749_826_464
        assert unique + positions(16, 16, width).size == 675_129_632  # Meta stores these too


def test_a_layer_of_qkv_is_three_of_diffusers(folder):
    """And a patch is flattened by rows, columns and channels, which run fastest."""
    tensors, params = load_file(folder / WEIGHTS), make_params(INFO)
    qkv = np.split(params["blocks"]["qkv"]["kernel"][1], 3, axis=1)
    for letter, kernel in zip("qkv", qkv, strict=True):
        stored = tensors[f"transformer_blocks.1.attn1.to_{letter}.weight"]
        np.testing.assert_array_equal(stored, kernel.T)
    stored, kernel = tensors["pos_embed.proj.weight"], params["patch"]["kernel"]
    for row, column, channel in np.ndindex(2, 2, 3):
        flat = kernel[(2 * row + column) * 3 + channel]
        np.testing.assert_array_equal(stored[:, channel, row, column], flat)


def test_here_and_back(folder):
    found = hub.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, make_params(INFO))
    assert found.info.config.network == NETWORK
    assert (found.info.x_shape, found.info.conditioning) == (INFO.x_shape, INFO.conditioning)
    assert (found.weights, found.step, found.autoencoder) == ("ema", 7, None)
    assert found.info.config.train.condition_dropout > 0
    assert any(re.search(naming("frequencies"), note) for note in found.notes)


def test_published_configuration(folder):
    """The old class name, without norm_eps, with empty fields of other transformers."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["norm_eps"]
    config |= {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0"}
    config |= {"cross_attention_dim": None, "only_cross_attention": False, "norm_num_groups": 32}
    path.write_text(json.dumps(config))
    assert hub.load(folder).info.config.network == NETWORK
    del config["norm_type"]  # another transformer, by the default of that class
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=naming("norm_type", "layer_norm", "ada_norm_zero")):
        hub.load(folder)


MISTAKES = [
    ({"_class_name": "PixArtTransformer2DModel"}, ["PixArtTransformer2DModel", dit.CLASS]),
    ({"norm_type": "ada_norm_single"}, ["norm_type", "ada_norm_single"]),
    ({"activation_fn": "geglu"}, ["activation_fn", "geglu"]),
    ({"attention_bias": False}, ["attention_bias", False]),
    ({"norm_elementwise_affine": True}, ["norm_elementwise_affine", True]),
    ({"attention_head_dim": 5}, ["attention_head_dim", 5]),
    ({"num_embeds_ada_norm": None}, ["num_embeds_ada_norm", None]),
    ({"sample_size": 5}, ["sample_size", 5, "patch_size"]),
    ({"sample_size": [4, 4]}, ["sample_size", [4, 4]]),
    ({"out_channels": 4}, ["out_channels", 4]),
    ({"cross_attention_dim": 768}, ["cross_attention_dim", 768]),
    ({"num_layers": 4}, [WEIGHTS, "transformer_blocks.3"]),
    ({"num_layers": 2}, [WEIGHTS, "transformer_blocks.2"]),
    ({"patch_size": 4}, [WEIGHTS, "pos_embed.proj.weight", (8, 3, 2, 2), (8, 3, 4, 4)]),
    ({"num_embeds_ada_norm": 9}, [WEIGHTS, "class_embedder.embedding_table", (3, 8)]),
]


@pytest.mark.parametrize(("fields", "names"), MISTAKES)
def test_networks_that_do_not_fit(folder, fields, names):
    edit(folder, "config.json", **fields)
    with pytest.raises(ValueError, match=naming(*names)):
        hub.load(folder)


def test_embedders_that_differ(folder):
    """Another block's would be ignored by a network that shares them."""
    tensors = load_file(folder / WEIGHTS)
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=naming(WEIGHTS, name)):
        hub.load(folder)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        ({"frequency_shift": 0.0}, ["frequency_shift", 0]),
        ({"norm_epsilon": 1e-5}, ["norm_epsilon", 1e-05]),
        ({"mlp_ratio": 2}, ["mlp_ratio", 2]),
    ],
)
def test_networks_that_diffusers_does_not_have(tmp_path, network, names):
    config = Config(network=dataclasses.replace(NETWORK, **network))
    with pytest.raises(ValueError, match=naming("diffusers", *names)):
        hub.save(tmp_path, INFO._replace(config=config), {}, "ema", 0)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"conditioning": UNCONDITIONAL}, ["conditioning"]),
        ({"conditioning": ClassLabel(2, has_null_label=False)}, ["conditioning", "null"]),
        ({"x_shape": (4, 8, 3)}, ["4x8"]),
        (
            {
                "config": Config(
                    network=NETWORK, diffusion=Diffusion(schedule="flow", prediction="sit")
                )
            },
            ["diffusion.schedule", "flow"],
        ),
    ],
)
def test_models_that_diffusers_does_not_have(tmp_path, changes, names):
    info = INFO._replace(**changes)
    with pytest.raises(ValueError, match=naming(*names)):
        hub.save(tmp_path, info, make_params(info), "ema", 0)


# ----------------------------------------------------------------------------- Meta's files

TINY = {"T": {"width": 8, "depth": 2, "heads": 2}}


def meta_layers(width, depth, inside, outside, patch, rows):
    """The layers of Meta's DiT, written down from its source."""
    found = {
        "x_embedder.proj": (width, inside, patch, patch),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.embedding_table": (rows, width),
        "final_layer.linear": (patch * patch * outside, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for i in range(depth):
        found |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    return found


def meta_tensors(width=8, depth=2, inside=4, outside=8, patch=2, rows=4, side=3):
    r, tensors = np.random.default_rng(0), {}
    for name, shape in meta_layers(width, depth, inside, outside, patch, rows).items():
        tensors[f"{name}.weight"] = 0.3 * r.normal(size=shape).astype(np.float32)
        if "table" not in name:
            tensors[f"{name}.bias"] = 0.3 * r.normal(size=shape[:1]).astype(np.float32)
    return tensors | {"pos_embed": positions(side, side, width)[None]}


def forward(tensors, x, t, label, heads):
    """Meta's DiT in numpy, float64: x [B, C, H, W] to [B, 2C, H, W]."""

    def layer(name, h):
        return h @ np.float64(tensors[f"{name}.weight"]).T + tensors[f"{name}.bias"]

    def silu(h):
        return h / (1 + np.exp(-h))

    def norm(h, shift, scale):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        return h * (1 + scale[:, None]) + shift[:, None]

    frequencies = np.exp(-np.log(10000) * np.arange(128) / 128)
    waves = t[:, None] * frequencies
    features = np.concatenate([np.cos(waves), np.sin(waves)], -1)
    c = layer("t_embedder.mlp.2", silu(layer("t_embedder.mlp.0", features)))
    c = silu(c + tensors["y_embedder.embedding_table.weight"][label])
    kernel = np.float64(tensors["x_embedder.proj.weight"])
    p, (batch, _, height, width) = kernel.shape[-1], x.shape
    rows, columns = height // p, width // p
    cut = x.reshape(batch, -1, rows, p, columns, p)
    h = np.einsum("bcipjq,dcpq->bijd", cut, kernel).reshape(batch, rows * columns, -1)
    h = h + tensors["x_embedder.proj.bias"] + tensors["pos_embed"]
    depth = sum(name.endswith("attn.proj.bias") for name in tensors)
    for i in range(depth):
        parts = np.split(layer(f"blocks.{i}.adaLN_modulation.1", c), 6, -1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        qkv = layer(f"blocks.{i}.attn.qkv", norm(h, shift_1, scale_1))
        q, k, v = np.moveaxis(qkv.reshape(batch, rows * columns, 3, heads, -1), 2, 0)
        scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        out = np.einsum("bhnm,bmhd->bnhd", shares, v).reshape(h.shape)
        h = h + gate_1[:, None] * layer(f"blocks.{i}.attn.proj", out)
        m = layer(f"blocks.{i}.mlp.fc1", norm(h, shift_2, scale_2))
        m = m / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (m + 0.044715 * m**3)))
        h = h + gate_2[:, None] * layer(f"blocks.{i}.mlp.fc2", m)
    shift, scale = np.split(layer("final_layer.adaLN_modulation.1", c), 2, -1)
    h = layer("final_layer.linear", norm(h, shift, scale))
    h = h.reshape(batch, rows, columns, p, p, -1)
    return np.einsum("bijpqc->bcipjq", h).reshape(batch, -1, height, width)


def read_meta(tensors):
    return dit.read_meta(Weights(tensors, {}, Path("dit.pt"), ""))


def test_meta_files_are_the_same_function(monkeypatch):
    """With frequencies over half and norms of 1e-6, which are not those of diffusers."""
    monkeypatch.setattr(dit, "SIZES", TINY)
    tensors = meta_tensors()
    found = read_meta(tensors)
    assert (found.x_shape, found.conditioning) == ((6, 6, 4), ClassLabel(3))
    r = np.random.default_rng(1)
    x, t, label = r.normal(size=(3, 6, 6, 4)), np.array([0, 500, 999]), np.array([0, 2, 3])
    with jax.default_matmul_precision("highest"):
        module = found.network.build(found.x_shape, found.conditioning)
        inputs = np.float32(x), np.float32(t), label
        ours = np.asarray(jax.jit(module.apply)({"params": found.params}, *inputs))
    theirs = forward(tensors, x.transpose(0, 3, 1, 2), t, label, 2).transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-5


def test_sit_runs_from_noise_to_data(monkeypatch, tmp_path):
    """SiT's own equation: Euler steps of dx/dt = v(x, t) from noise at t = 0 to data at t = 1.

    The network gets t itself; ours are the rows of DDIM on the path of flow matching.
    """
    monkeypatch.setattr(dit, "SIZES", TINY)
    tensors, label, steps = meta_tensors(), np.array([0, 2]), 4
    noise = np.random.default_rng(1).normal(size=(2, 6, 6, 4))
    x = noise.transpose(0, 3, 1, 2)
    for k in range(steps):
        velocity = forward(tensors, x, np.full(2, k / steps), label, 2)[:, :4]
        x = x + velocity / steps
    path = save(tmp_path / "sit.pt", {name: stored(v, name) for name, v in tensors.items()})
    found = hub.load(path)
    info, config = found.info, found.info.config
    network, levels = build_network(info, build_module(info)), build_schedule(config)
    condition = denoiser.from_network(network, found.params, build_parameterization(config))
    denoise = jax.jit(denoiser.condition_on(condition, label))
    plan = sampler.ddim(levels, np.array([1000, 750, 500, 250]))
    with jax.default_matmul_precision("highest"):
        ours = run_plan(lambda x, level: np.asarray(denoise(np.float32(x), level)), plan, noise)
    theirs = x.transpose(0, 2, 3, 1)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


def test_sizes_of_meta_files():
    """The number of heads follows from width and depth, and from nothing in a file."""
    tensors = {
        name: np.broadcast_to(np.float32(0), value)
        for layer, shape in meta_layers(1152, 28, 4, 8, 2, 1001).items()
        for name, value in ((f"{layer}.weight", shape), (f"{layer}.bias", shape[:1]))
        if name != "y_embedder.embedding_table.bias"
    }
    tensors["pos_embed"] = positions(16, 16, 1152)[None]
    assert sum(np.prod(value.shape) for value in tensors.values()) == 675_129_632
    network = size_of_paper("XL", 2, learned_variance=True)
    assert dit._heads(1152, 28, Path("a.pt")) == network.heads == 16
    for size in SIZES.values():
        assert dit._heads(size["width"], size["depth"], Path("a.pt")) == size["heads"]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"pos_embed": np.ones((1, 9, 8))}, ["pos_embed", (1, 9, 8)]),
        ({"pos_embed": positions(2, 4, 8)[None]}, ["pos_embed", (1, 8, 8)]),
        ({"blocks.2.attn.qkv.weight": np.ones(2)}, [3, 8, "heads"]),
        ({"final_layer.linear.weight": np.ones((20, 8))}, ["final_layer.linear", (32,), (16,)]),
        ({"blocks.1.mlp.fc1.bias": np.ones(31)}, ["blocks.1.mlp.fc1.bias", (31,), (32,)]),
        ({"optimizer.weight": np.ones(1)}, ["optimizer.weight"]),
        ({"x_embedder.proj.weight": np.ones((8, 4))}, ["dimensions"]),
        ({"pos_embed": None}, ["pos_embed"]),
        ({"y_embedder.embedding_table.weight": None}, ["y_embedder.embedding_table.weight"]),
        ({"blocks.0.attn.proj.bias": None}, ["blocks.0.attn.proj.bias"]),
    ],
)
def test_meta_files_that_do_not_fit(monkeypatch, change, names):
    monkeypatch.setattr(dit, "SIZES", TINY)
    tensors = {k: v for k, v in (meta_tensors() | change).items() if v is not None}
    with pytest.raises(ValueError, match=naming("dit.pt", *names)):
        read_meta(tensors)
