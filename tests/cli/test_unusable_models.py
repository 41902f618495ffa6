"""Models that make no images: every command says so in one line, before anything is sampled."""

import json

import jax
import numpy as np
import pytest
from helpers import check_mistake
from PIL import Image

from diffjax.build import ModelInfo, abstract_params, build_module
from diffjax.cli import main
from diffjax.config import Config
from diffjax.interop import hub
from diffjax.nn.conditioning import UNCONDITIONAL
from diffjax.nn.unet import UNetConfig

NETWORK = UNetConfig(channels=4, multipliers=(1,), norm_groups=1, middle_attention=False)
COMMANDS = {
    "sample": "sample {model} --num 8 --steps 2 --out {tmp}/o.png",
    "preview": "sample {model} --num 8 --steps 2 --out {tmp}/o.png --preview",
    "edit": "edit vary {model} --images {tmp}/image.png --start 500 --steps 2 --out {tmp}/o.png",
    "convert": "convert {model} {tmp}/run",
    "evaluate": "evaluate {model} --features pixels --num 8 --steps 2",
    "frontier": "frontier {model} --out {tmp}/report --features pixels",
    "distill": "distill {model} --workdir {tmp}/students --data.name digits",
    "likelihood": "likelihood {model}",
}


def spoil_nan(folder, params):
    params["out"]["kernel"][0, 0, 0, 0] = np.nan
    return ("out/kernel",)


def spoil_latent(folder, params):
    (folder / "model_index.json").write_text(json.dumps({"vqvae": ["diffusers", "VQModel"]}))
    return str(folder), "vqvae"


def spoil_process(folder, params):
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    return str(path), "rescale_betas_zero_snr", "epsilon"


def spoil_channels(folder, params):
    return ("4",)


def make(folder, spoil, scale=0.1):
    """A network of random parameters with one fault, and the names that an error has."""
    shape = (8, 8, 4 if spoil is spoil_channels else 1)
    info = ModelInfo(Config(network=NETWORK), shape, UNCONDITIONAL)
    r = np.random.default_rng(0)
    like = abstract_params(info, build_module(info))
    params = jax.tree.map(lambda p: (scale * r.normal(size=p.shape)).astype(np.float32), like)
    folder.mkdir()
    hub.save(folder, info, params, "ema", 0)
    names = spoil(folder, params)
    if spoil is spoil_nan:
        hub.save(folder, info, params, "ema", 0)
    return names


SPOILS = [spoil_nan, spoil_latent, spoil_process, spoil_channels]


@pytest.fixture(scope="module", params=SPOILS, ids=lambda spoil: spoil.__name__[6:])
def spoilt(request, tmp_path_factory):
    """A folder with one fault, and the names that an error has."""
    folder = tmp_path_factory.mktemp("spoilt") / "theirs"
    return folder, make(folder, request.param)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_makes_no_images(spoilt, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, names = spoilt
    Image.new("L", (8, 8), 100).save(tmp_path / "image.png")
    check_mistake(main, COMMANDS[name], names, capsys, model=f"hf:{folder}", tmp=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"image.png"}


@pytest.mark.parametrize("name", ["sample", "preview", "edit"])
def test_images_that_overflow(name, tmp_path, capsys, monkeypatch):
    """Finite weights may still give images that are not: none is written."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "theirs", lambda folder, params: (), scale=1e30)
    Image.new("L", (8, 8), 100).save(tmp_path / "image.png")
    words = "sample", "2" if name != "edit" else "1"
    places = {"model": f"hf:{tmp_path / 'theirs'}", "tmp": tmp_path}
    check_mistake(main, COMMANDS[name], words, capsys, after_progress=True, **places)
    assert not (tmp_path / "o.png").exists()
