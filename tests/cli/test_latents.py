"""A model of latents, from images to samples, edits and figures, by the programs."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import check_mistake as check
from helpers import naming
from PIL import Image

from diffjax.cli import main
from diffjax.cli.options import DataOptions
from diffjax.data.image_io import to_float
from diffjax.data.latents import load_latents
from diffjax.inference.autoencoder import load_autoencoder
from diffjax.inference.editing import Editor, EditRequest, mask_of_x
from diffjax.inference.model import load_model
from tests.latents import SHAPE, write_autoencoder, write_images

pytestmark = pytest.mark.slow
CONFIG = """
from diffjax.config import Config, Data, Diffusion, Train
from diffjax.nn.dit import DiTConfig

config = Config(
    data=Data(source="latents", path={path!r}, flip=True),
    network=DiTConfig(width=8, depth=1, heads=1),
    diffusion=Diffusion(schedule="cosine", T=20, prediction="v"),
    train=Train(
        steps=2, batch=16, warmup=0, save_every=2, eval_every=2, preview_every=2, power_ema=(0.1,)
    ),
)
"""


class Place:
    """The files of one module of tests."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("images", "autoencoder", "latents", "config", "run"):
            setattr(self, name, folder / name)
        self.config = folder / "dit.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, an autoencoder, latents, and a DiT that was trained on them for two steps."""
    place = Place(tmp_path_factory.mktemp("latents"))
    write_autoencoder(place.autoencoder, write_images(place.images, num=160))
    run("encode", place.autoencoder, "--out", place.latents, "--mirror")
    place.config.write_text(CONFIG.format(path=str(place.latents)))
    run("train", place.config, "--workdir", place.run)
    return place


@pytest.fixture(scope="module")
def other(place):
    """The folder of the same images, encoded by another autoencoder; and its checksum."""
    autoencoder = write_autoencoder(place.folder / "autoencoder-2", place.images, seed=1)
    run("encode", autoencoder, "--out", place.folder / "other", "--mirror")
    return place.folder / "other", load_autoencoder(autoencoder).checksum[:8]


def run(*words):
    main([part for word in words for part in str(word).split()])


def check_mistake(command, names, capsys):
    capsys.readouterr()  # what was printed before
    check(main, command, tuple(map(str, names)), capsys)


# ------------------------------------------------------------------------------- training


def test_run_folder(place):
    """It has the autoencoder of the latents, which decodes previews and samples."""
    latents, kept = (load_autoencoder(each / "autoencoder") for each in (place.latents, place.run))
    assert kept.checksum == latents.checksum == load_autoencoder(place.autoencoder).checksum
    assert kept.config == latents.config
    model = load_model(place.run)
    assert (model.info.x_shape, model.image_shape) == ((4, 4, 2), SHAPE)
    assert (model.info.autoencoder, model.codec.bounds) == (kept.checksum, None)
    assert [path.name for path in (place.run / "previews").iterdir()] == ["0000002.png"]
    held_out = load_latents(place.latents).held_out
    images = np.load(place.images)["x"]
    x = model.codec.encode(to_float(images))
    modes = np.stack([held_out[i]["moments"][..., :2] for i in range(len(held_out))])
    distance = np.abs(x[:, None] - modes).max((2, 3, 4)).min(0)
    assert distance.max() < 1e-5  # the codec is the map that the model was trained behind
    losses = [json.loads(line) for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    assert any("held_out_loss" in line for line in losses)


def test_resuming(place, other, tmp_path, capsys):
    """A run goes on with its latents, and is refused those of another autoencoder or scaling."""
    workdir, latents = tmp_path / "run", tmp_path / "latents"
    shutil.copytree(place.run, workdir)
    words = f"train --resume {workdir} --train.steps 3 --train.preview-every 0"
    words += " --train.eval-every 0"
    names = workdir, other[1], load_autoencoder(place.autoencoder).checksum[:8]
    check_mistake(f"{words} --data.path {other[0]}", names, capsys)
    scaled = tmp_path / "scaled"
    shutil.copytree(place.latents, scaled)
    for path, name in (
        (scaled / "manifest.json", "scaling"),
        (scaled / "autoencoder" / "config.json", "scaling_factor"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: 0.5}))
    check_mistake(f"{words} --data.path {scaled}", (scaled, "scaling", 0.5), capsys)
    shutil.copytree(place.latents, latents)  # they have moved
    run(words, "--data.path", latents)
    assert load_model(workdir).step == 3


def test_models_without_their_autoencoder(place, other, tmp_path, capsys):
    """A run whose autoencoder is absent, or another one, is not opened."""
    workdir = tmp_path / "run"
    shutil.copytree(place.run, workdir)
    shutil.rmtree(workdir / "autoencoder")
    command = f"sample {workdir} --num 1 --out {tmp_path}/a.png"
    check_mistake(command, (workdir / "autoencoder",), capsys)
    shutil.copytree(other[0] / "autoencoder", workdir / "autoencoder")
    names = load_model(place.run).info.autoencoder[:8], other[1]
    check_mistake(command, (workdir / "autoencoder", *names), capsys)


def test_latents_that_do_not_fit(place, other, tmp_path, capsys):
    """Mirrors that are missing, an autoencoder to train on latents, students of other latents."""
    plain = tmp_path / "plain"
    shutil.copytree(place.latents, plain)
    manifest = json.loads((plain / "manifest.json").read_text())
    (plain / "manifest.json").write_text(json.dumps(manifest | {"mirrored": False}))
    words = f"train {place.config} --workdir {tmp_path}/run --data.path {plain}"
    check_mistake(words, ("data.flip", plain), capsys)
    words = f"encode {place.autoencoder} --out {tmp_path}/a --data.config {place.config}"
    check_mistake(words, ("latents",), capsys)
    check_mistake(f"encode {place.run} --out {tmp_path}/a", (place.run,), capsys)
    words = f"encode hf:{place.latents}/autoencoder --out {tmp_path}/a"
    check_mistake(words, ("data.config", f"hf:{place.latents}/autoencoder"), capsys)
    check_mistake(f"{words} --data.config digits --batch 0", ("batch", 0), capsys)
    words = f"distill {place.run} --workdir {tmp_path}/students --start 2 --end 1"
    names = other[1], load_model(place.run).info.autoencoder[:8]
    check_mistake(f"{words} --data.path {other[0]}", names, capsys)


# ------------------------------------------------------------------------------- use


def test_samples_are_decoded(place, tmp_path):
    out = tmp_path / "images"
    run("sample", place.run, "--num 8 --steps 2 --guidance 2 --condition 3 --out-dir", out)
    files = sorted(out.iterdir())
    assert len(files) == 8
    assert {np.asarray(Image.open(path)).shape for path in files} == {SHAPE[:2]}


def test_edits(place, tmp_path):
    """Known pixels stay when a part is inpainted, and pairs are interpolated."""
    out = tmp_path / "inpainted"
    words = f"--num 2 --steps 2 --out-dir {out}"
    run("edit inpaint", place.run, words, "--mask left --resample 1")
    images = np.load(place.images)["x"]
    for path in out.iterdir():
        pixels = np.asarray(Image.open(path))[..., None]
        same = (pixels == images)[:, :, 4:].all((1, 2, 3))
        assert same.sum() == 1
        assert (pixels != images[same])[:, :, :4].any()
    run("edit interpolate", place.run, words.replace("inpainted", "between"), "--between 1")
    assert len(list((tmp_path / "between").iterdir())) == 3


def test_masks_of_latents(place):
    """A latent is known if all of its pixels are, and is then the image's own."""
    model = load_model(place.run)
    mask = np.ones((2, *SHAPE), np.float32)
    mask[0, 3, 5] = 0
    mask[1, :, :3] = 0.5
    expected = np.ones((2, 4, 4, 2))
    expected[0, 1, 2] = 0
    expected[1, :, :2] = 0.5
    assert np.array_equal(mask_of_x(mask, (2, 4, 4, 2)), expected)
    assert mask_of_x(mask, mask.shape) is mask
    chequered = np.indices(SHAPE[:2]).sum(0) % 2
    images = to_float(np.load(place.images)["x"][:8])
    with pytest.raises(ValueError, match=naming("2x2")):
        Editor(model).inpaint(images, chequered, EditRequest(2), seed=0)


def test_figures(place, tmp_path):
    """The real images are those that were encoded; a density is told to be one of latents."""
    out, bits = tmp_path / "rows.jsonl", tmp_path / "bits.json"
    words = "--features pixels --num 40 --steps 2 --reference train"
    run("evaluate", place.run, words, "--out", out)
    row = json.loads(out.read_text())
    assert "images" in row["reference"]
    assert row["image_size"] == "4x4x2"
    pytest.importorskip("diffrax")
    run("likelihood", place.run, "--num 2 --repeats 1 --tolerance 0.01 --evaluations 2 --out", bits)
    rows = json.loads(bits.read_text())
    assert all("latents" in row["measure"] and np.isfinite(row["bits_per_dim"]) for row in rows)


def test_real_images(place, tmp_path):
    """They are those that the latents are of, wherever either has moved."""
    config = load_model(place.run).info.config
    assert DataOptions().locate(config).data.path == str(place.images)
    moved = tmp_path / "images"
    found = DataOptions(str(moved)).locate(config).data
    assert (found.source, found.path) == ("npz", str(moved))
    latents = tmp_path / "latents"
    shutil.copytree(place.latents, latents)
    manifest = json.loads((latents / "manifest.json").read_text())
    manifest["data"]["path"] = "elsewhere"
    (latents / "manifest.json").write_text(json.dumps(manifest))
    found = DataOptions(str(latents)).locate(config).data
    assert (found.source, found.path, found.conditions) == ("npz", "elsewhere", ("label",))
    lost = dataclasses.replace(config, data=dataclasses.replace(config.data, path="lost"))
    assert DataOptions(str(latents)).trained_on(lost).data.path == "elsewhere"
    assert DataOptions(str(moved)).trained_on(config).data.path == str(place.images)


def test_students(place, tmp_path):
    """A student has a copy of the autoencoder, and its samples are decoded."""
    words = "--start 2 --end 1 --train.steps 1 --train.preview-every 0"
    run("distill", place.run, "--workdir", tmp_path, words, "--train.eval-every 0")
    (student,) = (path.parent for path in tmp_path.rglob("autoencoder"))
    model = load_model(student)
    assert model.info.config.distillation.steps == 1
    assert model.info.autoencoder == load_model(place.run).info.autoencoder
    decoded = model.codec.decode(np.zeros((8, *model.info.x_shape), np.float32))
    assert decoded.shape == (8, *SHAPE)


def test_average(place, tmp_path):
    """The run folder of an average has the autoencoder too."""
    run("average", place.run, "--length 0.1 --out", tmp_path / "average")
    model, averaged = load_model(place.run), load_model(tmp_path / "average")
    assert averaged.info.autoencoder == model.info.autoencoder
    assert averaged.autoencoder.config == model.autoencoder.config


def test_dry_run(place, capsys):
    """The cost is that of the network of latents."""
    run("dry-run", place.config, "--target cpu")
    assert "4x4x2" in capsys.readouterr().out
