"""diffusers' folders: their equations live where diffusers is installed (`make parity`), their files everywhere."""

import json
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_mistake, naming
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from diffjax import schedule
from diffjax.build import build_schedule, build_unet, init_params
from diffjax.cli import convert, sample
from diffjax.config import Config, Data, Diffusion, Train, UNetConfig
from diffjax.inference.pipeline import load_model
from diffjax.interop import unet2d

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHAPE = (8, 8, 1)


def params_of(config, classes, seed=0):
    """Parameters without zeros, of the structure of a configuration's network."""
    unet = build_unet(config, SHAPE, classes)
    like = jax.eval_shape(lambda key: init_params(unet, SHAPE, key), jax.random.key(0))
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
    null_label=st.booleans(),
)
diffusions = st.builds(
    Diffusion,
    schedule=st.sampled_from(["linear", "scaled_linear", "cosine"]),
    zero_terminal_snr=st.booleans(),
    T=st.sampled_from([200, 1000]),
    prediction=st.sampled_from(["eps", "x0", "v"]),
)


@settings(max_examples=12)
@given(networks, diffusions, st.sampled_from([0, 3]), st.sampled_from(["ema", "raw"]))
def test_what_is_written_is_read_again(tmp_path_factory, network, diffusion, classes, weights):
    config = Config(network=network, diffusion=diffusion)
    folder, params = tmp_path_factory.mktemp("theirs"), params_of(config, classes)
    unet2d.save(folder, config, SHAPE, classes, params, weights, 7)
    found = unet2d.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert (found.image_shape, found.classes, found.weights, found.step) == (
        SHAPE,
        classes,
        weights,
        7,
    )
    levels = build_schedule(config), build_schedule(found.config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *levels)
    assert found.config.diffusion.prediction == diffusion.prediction
    # The same function: heads of one number or one width, and a row that no label uses, are written alike.
    again = unet2d._settings(found.config, SHAPE, found.classes)
    assert again == unet2d._settings(config, SHAPE, classes)


CONFIG = Config(
    network=UNetConfig(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), norm_groups=4),
    data=Data(),
)


@pytest.fixture
def theirs(tmp_path):
    """A folder, and a way to change its files: theirs("config.json", sample_size=None)."""
    unet2d.save(tmp_path / "theirs", CONFIG, SHAPE, 3, params_of(CONFIG, 3), "ema", 0)

    def change(name, **fields):
        path = tmp_path / "theirs" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return tmp_path / "theirs"

    return change


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
    ("scheduler_config.json", {"beta_schedule": "sigmoid"}, ["beta_schedule", "sigmoid", "linear"]),
    ("scheduler_config.json", {"prediction_type": "flow"}, ["prediction_type", "flow", "epsilon"]),
    ("scheduler_config.json", {"trained_betas": [0.1]}, ["trained_betas"]),
    ("scheduler_config.json", {"sigma_max": 80}, ["DDPMScheduler", "beta_schedule"]),
]


@pytest.mark.parametrize(("name", "fields", "names"), MISTAKES)
def test_what_does_not_fit_is_named(theirs, name, fields, names):
    with pytest.raises(ValueError, match=naming(name, *names)):
        unet2d.load(theirs(name, **fields))


def test_files_that_cannot_be_used_are_named(theirs):
    folder = theirs("config.json")
    (folder / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=naming(folder / WEIGHTS)):
        unet2d.load(folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=naming(folder, "diffusion_pytorch_model.bin")):
        unet2d.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=naming(folder / "config.json", "JSON")):
        unet2d.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=naming(folder, "config.json", "UNet2DModel")):
        unet2d.load(folder)


def test_a_pipeline_with_old_names_and_unknown_weights_is_read(theirs, tmp_path):
    """As google/ddpm-cifar10-32 stores its attention, and pipelines their parts."""
    folder = theirs("config.json")
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(folder / WEIGHTS)
    for now, before in new.items():
        tensors = {name.replace(now, before): value for name, value in tensors.items()}
    for part, name in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        (tmp_path / "pipeline" / part).mkdir(parents=True)
        (folder / name).rename(tmp_path / "pipeline" / part / name)
    save_file(tensors, tmp_path / "pipeline" / "unet" / WEIGHTS, metadata={"format": "pt"})
    found = unet2d.load(tmp_path / "pipeline")
    assert found.weights == "unknown"
    assert all(
        any(re.search(naming(word), remark) for remark in found.remarks) for word in ("weights", 4)
    )
    assert (found.classes, found.config.network.null_label, found.config.train.label_dropout) == (
        4,
        False,
        0,
    )
    jax.tree.map(np.testing.assert_array_equal, found.params, params_of(CONFIG, 3))


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
        ({}, WEIGHTS, {"weights": "raw"}, "raw"),
        ({}, WEIGHTS, {}, "unknown"),
    ],
)
def test_whether_weights_are_averaged_is_said_where_it_is_known(
    theirs, fields, name, metadata, expected
):
    folder = theirs("config.json", **fields)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / name, metadata={"format": "pt", **metadata})
    assert unet2d.load(folder).weights == expected


def test_a_repository_is_downloaded(theirs, monkeypatch):
    folder, asked = theirs("config.json"), []
    monkeypatch.setitem(
        sys.modules,
        "huggingface_hub",
        types.SimpleNamespace(
            snapshot_download=lambda name, allow_patterns: asked.append(name) or str(folder)
        ),
    )
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
def test_what_diffusers_does_not_have_is_not_written(tmp_path, network, diffusion, names):
    options = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "norm_groups": 4} | network
    config = Config(network=UNetConfig(**options), diffusion=Diffusion(**diffusion), train=Train())
    with pytest.raises(ValueError, match=naming("diffusers", *names)):
        unet2d.save(tmp_path, config, SHAPE, 3, params_of(config, 3), "ema", 0)


def test_the_programs_sample_from_a_folder_and_convert_it_both_ways(
    theirs, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = theirs("config.json")
    source = f"hf:{folder}"
    options = ["--steps", "3", "--num", "8", "--labels", "0,1,2", "--seed", "4", "--guidance", "2"]
    sample.main([source, *options, "--save", "a.npz"])
    said = capsys.readouterr().out
    assert all(remark in said for remark in load_model(source).remarks)
    assert (tmp_path / "runs" / "theirs" / "samples").is_dir()
    convert.main([source, "runs/mine", "--data", "digits"])
    sample.main(["runs/mine", *options, "--save", "b.npz"])
    convert.main(["runs/mine", "hf:again"])
    sample.main(["hf:again", *options, "--save", "c.npz"])
    a, b, c = (np.load(tmp_path / f"{name}.npz")["images"] for name in "abc")
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    assert load_model("runs/mine").description.config.data.name == "digits"


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("runs/a runs/b", "hf:"),
        ("hf:a hf:b", "hf:"),
        ("hf:{tmp}/nowhere runs/x", "{tmp}/nowhere"),
        ("runs/a hf:b --data mnist", ("data", "diffusers")),
        ("{tmp} hf:b", "{tmp}"),
        ("hf:{theirs} hf:{theirs}/x --checkpoint 3", "hf:"),
        ("hf:{theirs} {tmp}/new --checkpoint 3", ("hf:{theirs}", "checkpoint")),
    ],
)
def test_a_conversion_that_cannot_be_says_so(theirs, tmp_path, capsys, command, names):
    places = {"tmp": tmp_path, "theirs": theirs("config.json")}
    check_mistake(convert.main, command, names, capsys, **places)


# ---------------------------------------------------------------------------------------------- live

DDPM = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "attention_head_dim": None,
}
ADM = {
    "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}  # fmt: skip
LIVE = {
    "ddpm-cifar10-32 at a quarter of its width": DDPM | {
        "sample_size": 32, "block_out_channels": [32, 64, 64, 64], "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    "ddpm-celebahq-256 at an eighth of width and size": DDPM | {
        "sample_size": 32, "block_out_channels": [16, 16, 32, 32, 64, 64], "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    },
    "diffusers' defaults, class-conditional, heads of 8": {
        "sample_size": 16, "block_out_channels": [16, 32], "norm_num_groups": 8, "num_class_embeds": 5,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "heads of 4, scale and shift, a norm in the middle": {
        "sample_size": [8, 16], "in_channels": 1, "out_channels": 1, "block_out_channels": [16, 48],
        "norm_num_groups": 4, "attn_norm_num_groups": 4, "num_class_embeds": 11, "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift", "layers_per_block": 1,
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
    },
    "ADM, learned variance, heads of 16, no norm in the middle": ADM | {
        "sample_size": 16, "out_channels": 6, "block_out_channels": [16, 32], "norm_num_groups": 8,
        "attention_head_dim": 16, "num_class_embeds": 7,
    },
    "no attention in the middle": {
        "sample_size": 8, "block_out_channels": [8, 8], "norm_num_groups": 2, "add_attention": False,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LIVE)
def test_a_network_of_diffusers_says_the_same_here_and_back_there(name, tmp_path):
    """max|difference| / max|output| at most 2e-4, in float32 with full matmul precision, whatever the way."""
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = theirs.UNet2DModel(**LIVE[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    theirs.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    ).save_pretrained(tmp_path / "theirs")
    found = unet2d.load(tmp_path / "theirs")
    np.testing.assert_array_equal(build_schedule(found.config), schedule.cosine(1000))
    unet = build_unet(found.config, found.image_shape, found.classes)
    r = np.random.default_rng(0)
    x, t = r.normal(size=(3, *found.image_shape)).astype(np.float32), np.array([0, 500, 999])
    label = np.array([0, 1, found.classes - 1]) if found.classes else None
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(jax.jit(unet.apply)({"params": found.params}, x, jnp.asarray(t), label))
    unet2d.save(
        tmp_path / "back",
        found.config,
        found.image_shape,
        found.classes,
        found.params,
        found.weights,
        found.step,
    )
    theirs.DDPMScheduler.from_pretrained(tmp_path / "back")
    for folder in ("theirs", "back"):
        again = theirs.UNet2DModel.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            images = torch.from_numpy(x).permute(0, 3, 1, 2)
            said = again(
                images, torch.from_numpy(t), None if label is None else torch.from_numpy(label)
            ).sample
        said = said.permute(0, 2, 3, 1).numpy()
        assert np.abs(ours - said).max() / np.abs(said).max() < 2e-4
    assert Path(tmp_path / "back" / WEIGHTS).exists()
