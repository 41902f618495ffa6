"""Sources: pipelines of latents, names of classes, .pt files; and programs that use them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import check_mistake, naming

from diffjax.build import ModelInfo
from diffjax.cli import main
from diffjax.config import Config, Diffusion
from diffjax.inference.autoencoder import load_autoencoder
from diffjax.inference.model import load_model
from diffjax.interop import autoencoder_kl, dit, hub
from diffjax.interop.files import Weights
from diffjax.interop.published import Published
from diffjax.nn.autoencoder import AutoencoderConfig
from diffjax.nn.conditioning import UNCONDITIONAL, ClassLabel
from diffjax.nn.dit import DiTConfig
from diffjax.nn.unet import UNetConfig
from tests.interop.test_autoencoder_kl import make_params as make_autoencoder
from tests.interop.test_dit import TINY, meta_tensors
from tests.interop.test_torch_file import save, stored
from tests.interop.test_unet2d import edit, make_params

CODER = AutoencoderConfig(channels=(4, 4), blocks=1, norm_groups=1, scaling=0.7)
NETWORK = DiTConfig(width=8, depth=2, heads=2, frequency_shift=1.0, mlp_norm_epsilon=1e-5)
INFO = ModelInfo(Config(network=NETWORK), (4, 4, 4), ClassLabel(3, names=("ant", "bee", "cat")))


@pytest.fixture(scope="module")
def autoencoder():
    return CODER, make_autoencoder(CODER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, autoencoder):
    """A pipeline of latents, which tests copy."""
    folder = tmp_path_factory.mktemp("saved") / "theirs"
    hub.save(folder, INFO, make_params(INFO), "ema", 7, autoencoder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A pipeline of latents."""
    return Path(shutil.copytree(saved, tmp_path / "theirs"))


# ----------------------------------------------------------------------------- pipelines


def test_a_pipeline_here_and_back(folder, autoencoder):
    """Its null label is where DiTPipeline takes it, whatever the number of classes."""
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline"
    for part in ("transformer", "vae", "scheduler"):
        assert list((folder / part).glob("*config.json"))
        assert index[part][0] == "diffusers"
    found = hub.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, make_params(INFO))
    assert (found.info.x_shape, found.info.conditioning) == (INFO.x_shape, INFO.conditioning)
    config, params = found.autoencoder
    assert config == CODER
    jax.tree.map(np.testing.assert_array_equal, params, autoencoder[1])
    settings = json.loads((folder / "transformer" / "config.json").read_text())
    assert settings["num_embeds_ada_norm"] == 1000
    assert json.loads((folder / "vae" / "config.json").read_text())["sample_size"] == 8
    for inside in ("transformer", "transformer/"):
        assert hub.load(folder / inside).autoencoder is not None


def test_rows_without_a_class_are_the_null_label(autoencoder):
    part = dit.write(INFO, make_params(INFO), for_pipeline=True)
    table = part.tensors["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"]
    assert table.shape == (1001, 8)
    ours = make_params(INFO)["label"]["embedding"]
    np.testing.assert_array_equal(table[:3], ours[:3])
    np.testing.assert_array_equal(table[3:], np.broadcast_to(ours[3], (998, 8)))


def test_a_unet_of_latents_here_and_back(tmp_path, autoencoder):
    network = UNetConfig(channels=4, multipliers=(1,), norm_groups=1, middle_attention=False)
    info = ModelInfo(Config(network=network), (4, 4, 4), UNCONDITIONAL)
    params = make_params(info)
    hub.save(tmp_path / "theirs", info, params, "raw", 3, autoencoder)
    assert (tmp_path / "theirs" / "unet" / "config.json").exists()
    found = hub.load(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    assert found.autoencoder[0] == CODER


def test_parts_that_do_not_fit_are_named(folder, autoencoder):
    edit(folder, "vae/config.json", _class_name="VQModel")
    with pytest.raises(ValueError, match=naming(folder, "vae", "VQModel")):
        hub.load(folder)
    edit(folder, "vae/config.json", _class_name="AutoencoderKL", latent_channels=3)
    with pytest.raises(ValueError, match=naming("vae", "encoder.conv_out.bias")):
        hub.load(folder)
    other = dataclasses.replace(CODER, latent_channels=2)
    autoencoder_kl.save(folder / "vae", other, make_autoencoder(other))
    with pytest.raises(ValueError, match=naming("in_channels", 4, "latent_channels", 2)):
        hub.load(folder)
    shifted = dataclasses.replace(CODER, shift=0.5), autoencoder[1]
    with pytest.raises(ValueError, match=naming("shift", 0.5, "DiTPipeline")):
        hub.save(folder / "new", INFO, make_params(INFO), "ema", 0, shifted)
    many = INFO._replace(conditioning=ClassLabel(1001))
    with pytest.raises(ValueError, match=naming(1001, "DiTPipeline")):
        hub.save(folder / "new", many, make_params(many), "ema", 0, autoencoder)


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 500, "shift": 3.0}


def test_flow_matching_schedulers(folder, autoencoder):
    """The time of the network is T*sigma; a shift that depends on the size is refused."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(FLOW))
    expected = Diffusion(schedule="flow", shift=3.0, prediction="flow", T=500, time_scale=500.0)
    found = hub.load(folder)
    assert found.info.config.diffusion == expected
    hub.save(folder / "again", found.info, found.params, "ema", 0, autoencoder)
    assert not (folder / "again" / "model_index.json").exists()
    assert hub.load(folder / "again").autoencoder[0] == autoencoder[0]
    again = json.loads((folder / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert again == FLOW
    for name in ("use_dynamic_shifting", "invert_sigmas"):
        path.write_text(json.dumps(FLOW | {name: True}))
        with pytest.raises(ValueError, match=naming(name, True)):
            hub.load(folder)


# ----------------------------------------------------------------------------- names of classes


@pytest.mark.parametrize(
    ("given", "names", "told"),
    [
        ({"0": "ant", "1": "bee", "2": "cat, Felis catus"}, ("ant", "bee", "cat, Felis catus"), []),
        ({"0": "crane", "1": "bee", "2": "crane"}, ("crane (0)", "bee", "crane (2)"), []),
        ({"0": "ant", "1": "bee"}, (), ["id2label", 3]),
        ({}, (), []),
        (None, (), []),
    ],
)
def test_names_of_classes(given, names, told):
    """Those of model_index.json, each different, for all classes or for none."""
    network = Published(NETWORK, (4, 4, 4), ClassLabel(3), None)
    weights = Weights({}, {}, Path("weights"), "")
    found, notes = hub.name_classes(network, weights, {"id2label": given})
    assert found.conditioning == ClassLabel(3, names=names)
    assert len(notes) == bool(told)
    for note in notes:
        assert re.search(naming(*told), note)


def test_one_word_of_a_name():
    """A class is meant by any of the words between commas of its name, if no other has it."""
    names = ("tench, Tinca tinca", "crane", "crane, bird", "cat, 1, x")
    label = ClassLabel(4, names=names)
    texts = {"Tinca tinca": 0, "tench, Tinca tinca": 0, "crane": 1, "bird": 2, "crane, bird": 2}
    for text, number in texts.items():
        assert label.parse(text, 1).tolist() == [number]
    assert label.parse("tench,x,3,1", 4).tolist() == [0, 3, 3, 1]
    twice = ClassLabel(2, names=("a, c", "b, c"))
    with pytest.raises(ValueError, match=naming("c")):
        twice.parse("c", 1)


# ----------------------------------------------------------------------------- programs


def test_sampling_from_a_pipeline(folder, tmp_path, monkeypatch, capsys):
    """Names of classes are taken; images are decoded; a run folder is the same model."""
    monkeypatch.chdir(tmp_path)
    words = ["--condition", "bee", "--guidance", "4", "--num", "8", "--seed", "3", "--sampler"]
    words += ["dpm_solver_pp_2m:3", "--guidance-channels", "3"]
    source = f"hf:{folder}"
    main(["sample", source, *words, "--save", "a.npz"])
    found = np.load("a.npz")
    assert found["images"].shape == (8, 8, 8, 3)
    assert (found["labels"] == 1).all()
    main(["convert", source, "run"])
    out = capsys.readouterr().out
    assert "--data.source latents" in out
    assert "does not clip" not in out
    theirs, ours = load_model(source), load_model("run")
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.autoencoder.checksum == theirs.autoencoder.checksum
    assert ours.info.conditioning == theirs.info.conditioning
    main(["convert", "run", "hf:again"])
    again = hub.load(Path("again"))
    jax.tree.map(np.testing.assert_array_equal, again.params, hub.load(folder).params)
    assert again.autoencoder[0] == CODER
    capsys.readouterr()
    check_mistake(main, "convert run hf:again", "model_index.json", capsys)
    check_mistake(main, f"convert {source} new --data mnist", ("data", "mnist"), capsys)
    check_mistake(main, "sample hf:again/vae --num 8", "vae", capsys)


def test_an_autoencoder_is_converted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["convert", f"hf:{folder / 'vae'}", "run"])
    assert "diffjax encode run" in capsys.readouterr().out
    found = load_autoencoder("run")
    expected = load_autoencoder(folder / "vae")
    assert (found.config, found.checksum) == (expected.config, expected.checksum)
    found.info.config.check()
    main(["convert", "run", "hf:again"])
    for source in ("hf:again", f"hf:{folder}"):
        assert load_autoencoder(source).checksum == expected.checksum
    with pytest.raises(ValueError, match=naming("hf:run", "AutoencoderKL")):
        load_autoencoder("hf:run")


def test_a_pt_file_is_converted_with_an_autoencoder(folder, tmp_path, monkeypatch, capsys):
    """DiT and SiT have the same tensors: the file's name tells which it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dit, "SIZES", TINY)
    tensors = {name: stored(value, name) for name, value in meta_tensors(side=2).items()}
    for name, prediction, schedule in (("DiT", "eps", "linear"), ("my-sit", "sit", "flow")):
        path = save(tmp_path / f"{name}.pt", tensors)
        check_mistake(main, f"sample {path}", ("4", "autoencoder"), capsys)
        main(["convert", str(path), name, "--autoencoder", f"hf:{folder}"])
        model = load_model(name)
        diffusion = model.info.config.diffusion
        assert (diffusion.prediction, diffusion.schedule) == (prediction, schedule)
        assert (model.info.x_shape, model.info.conditioning.classes) == ((4, 4, 4), 3)
        assert model.autoencoder.config == CODER
        assert model.weights == "unknown"
        capsys.readouterr()
    assert any(re.search(naming("sit"), note) for note in hub.load(path).notes)
    mistakes = {
        "convert other.pt new": ("other.pt", "DiT"),
        "convert none.pt new": ("none.pt",),
        f"convert DiT.pt new --autoencoder {folder}/transformer": ("DiTTransformer2DModel",),
        f"convert hf:{folder} new --autoencoder {folder}/vae": ("autoencoder", "vae"),
        f"convert DiT hf:new --autoencoder {folder}/vae": ("autoencoder", "vae"),
    }
    save(tmp_path / "other.pt", tensors)
    for command, names in mistakes.items():
        check_mistake(main, command, names, capsys)
    save(tmp_path / "dit-of-else.pt", {"w": stored(np.ones(2, np.float32))})
    check_mistake(main, "convert dit-of-else.pt new", ("x_embedder.proj.weight",), capsys)
