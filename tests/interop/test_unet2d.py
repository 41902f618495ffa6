"""Folders of diffusers: their files everywhere, their equations where diffusers is installed."""

import dataclasses
import json
import re
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import naming
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from diffjax import schedule
from diffjax.build import ModelInfo, abstract_params, build_module, build_schedule
from diffjax.config import Config, Diffusion, Distillation
from diffjax.inference.model import load_model
from diffjax.interop import hub, unet2d
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel, Vector
from diffjax.nn.registry import NetworkConfig
from diffjax.nn.unet import UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHAPE = (8, 8, 1)


def make_params(info, seed=0):
    """Parameters without zeros, of the structure of a model's network."""
    like = abstract_params(info, build_module(info))
    r = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.3 * r.normal(size=leaf.shape)).astype(np.float32), like)


networks = st.builds(
    UNetConfig,
    channels=st.sampled_from([4, 8]),
    multipliers=st.sampled_from([(1,), (1, 2), (1, 1, 2)]),
    blocks=st.integers(1, 2),
    attention=st.sampled_from([(), (8,)]),
    head_width=st.sampled_from([None, 2, 4]),
    scale_shift=st.booleans(),
    resample_blocks=st.booleans(),
    symmetric_padding=st.booleans(),
    norm_groups=st.sampled_from([1, 2, 4]),
    norm_epsilon=st.sampled_from([1e-6, 1e-5]),
    sin_first=st.booleans(),
    frequency_shift=st.sampled_from([0, 1]),
    learned_variance=st.booleans(),
)
conditionings = st.one_of(
    st.just(UNCONDITIONAL),
    st.builds(
        ClassLabel,
        st.just(3),
        has_null_label=st.booleans(),
        names=st.sampled_from([(), ("cat", "dog", "eel")]),
    ),
)
diffusions = st.builds(
    lambda ends, **fields: Diffusion(zero_terminal_snr=ends[0], prediction=ends[1], **fields),
    st.sampled_from([(False, "eps"), (False, "x0"), (True, "x0"), (True, "v")]),
    schedule=st.sampled_from(["linear", "scaled_linear", "cosine"]),
    T=st.sampled_from([200, 1000]),
)


@settings(max_examples=12)
@given(networks, diffusions, conditionings, st.sampled_from(["ema", "raw"]))
def test_round_trip(tmp_path_factory, network, diffusion, conditioning, weights):
    info = ModelInfo(Config(network=network, diffusion=diffusion), SHAPE, conditioning)
    folder, params = tmp_path_factory.mktemp("folder"), make_params(info)
    hub.save(folder, info, params, weights, 7)
    found = hub.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert (found.weights, found.step) == (weights, 7)
    assert found.info.x_shape == SHAPE
    assert found.info.conditioning == conditioning
    config = found.info.config
    assert (config.data.conditions, config.data.known) == (
        (("label",) if conditioning.is_conditional else ()),
        False,
    )
    levels = build_schedule(info.config), build_schedule(config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *levels)
    assert config.diffusion.prediction == diffusion.prediction
    # The same function: heads of one number or one width are written alike.
    again = unet2d.write(found.info, found.params)
    assert again.settings == unet2d.write(info, params).settings


NETWORK = UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), norm_groups=4)
INFO = ModelInfo(Config(network=NETWORK), SHAPE, ClassLabel(3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of diffusers, which tests copy."""
    folder = tmp_path_factory.mktemp("saved") / "theirs"
    hub.save(folder, INFO, make_params(INFO), "ema", 0)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A folder of diffusers."""
    return Path(shutil.copytree(saved, tmp_path / "theirs"))


def edit(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


MISTAKES = [
    (
        "config.json",
        {"_class_name": "UNet2DConditionModel"},
        ["UNet2DConditionModel", "UNet2DModel"],
    ),
    ("config.json", {"sample_size": None}, ["sample_size", "None"]),
    (
        "config.json",
        {"time_embedding_type": "fourier"},
        ["time_embedding_type", "fourier", "positional"],
    ),
    ("config.json", {"out_channels": 5}, ["out_channels", 5, "in_channels"]),
    # A super-resolution network takes the small image too.
    ("config.json", {"in_channels": 6, "out_channels": 3}, ["out_channels", 3, "in_channels"]),
    ("config.json", {"act_fn": "mish"}, ["act_fn", "mish", "silu"]),
    ("config.json", {"act_fn": "gelu"}, ["act_fn", "gelu", "silu"]),
    ("config.json", {"act_fn": "relu"}, ["act_fn", "relu", "silu"]),
    ("config.json", {"class_embed_type": "timestep"}, ["class_embed_type", "timestep"]),
    ("config.json", {"class_embed_type": "identity"}, ["class_embed_type", "identity"]),
    ("config.json", {"center_input_sample": True}, ["center_input_sample", True]),
    ("config.json", {"mid_block_scale_factor": 2}, ["mid_block_scale_factor", 2]),
    ("config.json", {"mid_block_type": None}, ["mid_block_type", None]),
    ("config.json", {"time_embedding_dim": 64}, ["time_embedding_dim", 64]),
    ("config.json", {"resnet_time_scale_shift": "ada_group"}, ["resnet_time_scale_shift"]),
    ("config.json", {"norm_num_groups": 3}, ["norm_num_groups", 3, [8, 16]]),
    ("config.json", {"norm_num_groups": None}, ["norm_num_groups", None]),
    ("config.json", {"attn_norm_num_groups": 2}, ["attn_norm_num_groups", 2]),
    ("config.json", {"attention_head_dim": 6}, ["attention_head_dim", 6, [16, 16]]),
    ("config.json", {"sample_size": 9}, ["sample_size", 9]),
    ("config.json", {"sample_size": [8, 7]}, ["sample_size", [8, 7]]),
    (
        "config.json",
        {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
        ["down_block_types", "ResnetDownsampleBlock2D"],
    ),
    ("config.json", {"upsample_type": "resnet"}, ["down_block_types"]),
    ("config.json", {"block_out_channels": [8, 12]}, ["block_out_channels", [8, 12]]),
    (
        "config.json",
        {"down_block_types": ["SkipDownBlock2D"] * 2},
        ["down_block_types", "SkipDownBlock2D"],
    ),
    ("config.json", {"up_block_types": ["UpBlock2D"] * 2}, ["up_block_types", "UpBlock2D"]),
    ("config.json", {"layers_per_block": 2}, [WEIGHTS, "down_blocks.0.resnets.1"]),
    ("config.json", {"block_out_channels": [16, 32]}, [WEIGHTS, "conv_in.bias", (8,), (16,)]),
    ("config.json", {"num_class_embeds": None}, [WEIGHTS, "class_embedding.weight"]),
    ("scheduler_config.json", {"sigma_max": 80}, ["DDPMScheduler", "beta_schedule"]),
]


@pytest.mark.parametrize(("name", "fields", "names"), MISTAKES)
def test_networks_that_do_not_fit(folder, name, fields, names):
    edit(folder, name, **fields)
    with pytest.raises(ValueError, match=naming(name, *names)):
        hub.load(folder)


def test_unusable_files(folder):
    (folder / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=naming(folder / WEIGHTS)):
        hub.load(folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=naming(folder, "diffusion_pytorch_model.bin")):
        hub.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=naming(folder / "config.json", "JSON")):
        hub.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=naming(folder, "config.json", "UNet2DModel")):
        hub.load(folder)


def test_pipeline_with_old_names(folder, tmp_path):
    """As google/ddpm-cifar10-32 stores its attention, and pipelines their parts."""
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(folder / WEIGHTS)
    for now, before in new.items():
        tensors = {name.replace(now, before): value for name, value in tensors.items()}
    for part, name in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        (tmp_path / "pipeline" / part).mkdir(parents=True)
        (folder / name).rename(tmp_path / "pipeline" / part / name)
    save_file(tensors, tmp_path / "pipeline" / "unet" / WEIGHTS, metadata={"format": "pt"})
    found = hub.load(tmp_path / "pipeline")
    assert found.weights == "unknown"
    for word in ("weights", 4):
        assert any(re.search(naming(word), note) for note in found.notes)
    assert found.info.conditioning == ClassLabel(4, has_null_label=False)
    assert found.info.config.train.condition_dropout == 0
    jax.tree.map(np.testing.assert_array_equal, found.params, make_params(INFO))


@pytest.mark.parametrize(
    ("fields", "name", "metadata", "expected"),
    [
        (
            {"optimization_step": 9, "use_ema_warmup": False, "inv_gamma": 1.0, "decay": 0.999},
            WEIGHTS,
            {},
            "ema",
        ),
        ({}, "diffusion_pytorch_model.non_ema.safetensors", {}, "raw"),
        ({}, "diffusion_pytorch_model.non_ema-00001-of-00001.safetensors", {}, "raw"),
        ({}, "diffusion_pytorch_model.ema.safetensors", {}, "ema"),
        ({}, WEIGHTS, {"weights": "raw"}, "raw"),
        ({}, WEIGHTS, {}, "unknown"),
    ],
)
def test_kind_of_weights(folder, fields, name, metadata, expected):
    edit(folder, "config.json", **fields)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / name, metadata={"format": "pt", **metadata})
    found = hub.load(folder)
    assert (found.weights, found.info.imported) == (expected, expected)
    variant = re.search(r"(non_ema|ema)", name)
    assert not variant or any(re.search(naming(variant[1], name), note) for note in found.notes)


def as_pipeline(folder, to, index):
    """The folder as the unet and the scheduler of a pipeline."""
    (to / "scheduler").mkdir(parents=True)
    shutil.copytree(folder, to / "unet")
    (to / "unet" / "scheduler_config.json").rename(to / "scheduler" / "scheduler_config.json")
    (to / "model_index.json").write_text(json.dumps(index))
    return to


LATENT = [
    {"vqvae": ["diffusers", "VQModel"]},
    {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DModel"]},
]


@pytest.mark.parametrize("index", LATENT)
@pytest.mark.parametrize("inside", ["", "unet"])
def test_a_latent_pipeline_is_refused(folder, tmp_path, index, inside):
    """It is refused in whichever of its folders it is named: its network makes no pictures."""
    pipeline = as_pipeline(folder, tmp_path / "pipeline", index)
    with pytest.raises(ValueError, match=naming(pipeline, next(iter(index)))):
        hub.load(pipeline / inside)


def test_a_latent_pipeline_without_an_index_is_refused(folder):
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=naming(folder, "vae")):
        hub.load(folder)


@pytest.mark.parametrize("index", [{}, {"vqvae": [None, None], "unet": ["diffusers", "UNet"]}])
def test_a_pipeline_of_pixels_is_read(folder, tmp_path, index):
    """A pipeline may leave its autoencoder out."""
    found = hub.load(as_pipeline(folder, tmp_path / "pipeline", index))
    assert found.info.x_shape == SHAPE


def test_sources_have_one_set_of_weights_of_one_kind(folder):
    """It keeps its kind whatever is asked for, but an average is not as trained."""
    assert load_model(f"hf:{folder}").weights == "ema"
    with pytest.raises(ValueError, match=naming("weights", "raw", "ema")):
        load_model(f"hf:{folder}", weights="raw")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    for asked in ("ema", "raw"):
        assert load_model(f"hf:{folder}", weights=asked).weights == "unknown"


def test_notes_of_the_scheduler_are_those_of_the_model(folder):
    edit(folder, "scheduler_config.json", clip_sample_range=3.0)
    notes = load_model(f"hf:{folder}").notes
    assert any(re.search(naming("clip_sample_range", 3), note) for note in notes)


def test_repository_of_the_hub(folder, monkeypatch):
    asked = []
    hub = types.SimpleNamespace(
        snapshot_download=lambda name, allow_patterns: asked.append(name) or str(folder)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load_model("hf:someone/digits").name == "unet of hf:theirs"
    assert asked == ["someone/digits"]

    def offline(name, allow_patterns):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", offline)
    with pytest.raises(ValueError, match=naming("someone/digits", "no network")):
        load_model("hf:someone/digits")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=naming("someone/digits", "diffjax[hub]")):
        load_model("hf:someone/digits")


@pytest.mark.parametrize(
    ("network", "diffusion", "names"),
    [
        ({"norm_groups": None}, {}, ["norm_groups"]),
        ({"heads": 2, "attention": (8, 4)}, {}, [[4, 8], "head_width"]),
        ({"scale_shift": False, "middle_attention_norm": False}, {}, ["attention"]),
        ({}, {"schedule": "edm"}, ["edm", "cosine"]),
    ],
)
def test_networks_that_diffusers_does_not_have(tmp_path, network, diffusion, names):
    network = dataclasses.replace(NETWORK, **({"attention": ()} | network))
    info = INFO._replace(config=Config(network=network, diffusion=Diffusion(**diffusion)))
    with pytest.raises(ValueError, match=naming("diffusers", *names)):
        hub.save(tmp_path / "new", info, {}, "ema", 0)
    assert not (tmp_path / "new").exists()


@dataclasses.dataclass(frozen=True)
class OtherConfig(NetworkConfig):
    """The config of a network that is no UNet."""


@pytest.mark.parametrize(
    ("info", "names"),
    [
        (INFO._replace(config=Config(network=OtherConfig())), ["network", "OtherConfig"]),
        (INFO._replace(conditioning=Vector(2)), ["conditioning", "vector", 2]),
        (INFO._replace(conditioning=ClassLabel(3, field="digit")), ["conditioning", "digit"]),
        (
            INFO._replace(config=Config(network=NETWORK, distillation=Distillation(guidance=2.0))),
            ["conditioning", "guidance"],
        ),
    ],
)
def test_models_that_are_refused(tmp_path, info, names):
    with pytest.raises(ValueError, match=naming("UNet2DModel", *names)):
        hub.save(tmp_path, info, {}, "ema", 0)


def test_distilled_model(tmp_path):
    distillation = Distillation(method="progressive", teacher="a", start=64, steps=4)
    info = INFO._replace(config=dataclasses.replace(INFO.config, distillation=distillation))
    hub.save(tmp_path, info, make_params(info), "ema", 0)
    assert hub.load(tmp_path).info.config.distillation == distillation


# ------------------------------------------------------------------------------- live

DDPM = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "attention_head_dim": None,
}
ADM = {
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
LIVE = {
    "ddpm-cifar10-32 at a quarter of its width": DDPM
    | {
        "sample_size": 32,
        "block_out_channels": [32, 64, 64, 64],
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "ddpm-celebahq-256 at an eighth of width and size": DDPM
    | {
        "sample_size": 32,
        "block_out_channels": [16, 16, 32, 32, 64, 64],
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    },
    "diffusers' defaults, class-conditional, heads of 8": {
        "sample_size": 16,
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "num_class_embeds": 5,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "heads of 4, scale and shift, a norm in the middle": {
        "sample_size": [8, 16],
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [16, 48],
        "norm_num_groups": 4,
        "attn_norm_num_groups": 4,
        "num_class_embeds": 11,
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
        "layers_per_block": 1,
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    },
    "ADM, learned variance, heads of 16, no norm in the middle": ADM
    | {
        "sample_size": 16,
        "out_channels": 6,
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "attention_head_dim": 16,
        "num_class_embeds": 7,
    },
    "no attention in the middle": {
        "sample_size": 8,
        "block_out_channels": [8, 8],
        "norm_num_groups": 2,
        "add_attention": False,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    },
}


@pytest.mark.parametrize("name", LIVE)
def test_network_of_diffusers_here_and_back(name, tmp_path):
    """max|difference| / max|output| at most 2e-4, in float32 with full matmul precision."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**LIVE[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    scheduler.save_pretrained(tmp_path / "theirs")
    found = hub.load(tmp_path / "theirs")
    info = found.info
    np.testing.assert_array_equal(build_schedule(info.config), schedule.cosine(1000))
    module = build_module(info)
    r = np.random.default_rng(0)
    x, t = r.normal(size=(3, *info.x_shape)).astype(np.float32), np.array([0, 500, 999])
    classes = info.conditioning.classes if info.conditioning.is_conditional else 0
    label = np.array([0, 1, classes - 1]) if classes else None
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(module.apply)({"params": found.params}, x, jnp.asarray(t), label))
    hub.save(tmp_path / "back", info, found.params, found.weights, found.step)
    diffusers.DDPMScheduler.from_pretrained(tmp_path / "back")
    for folder in ("theirs", "back"):
        again = diffusers.UNet2DModel.from_pretrained(tmp_path / folder).eval()
        inputs = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)
        with torch.no_grad():
            output = again(*inputs, None if label is None else torch.from_numpy(label)).sample
        output = output.permute(0, 2, 3, 1).numpy()
        assert np.abs(ours - output).max() / np.abs(output).max() < 2e-4
    assert Path(tmp_path / "back" / WEIGHTS).exists()
