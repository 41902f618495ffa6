"""Autoencoders through the programs: trained, resumed, evaluated, and refused as samplers."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import check_mistake
from PIL import Image

from diffjax.cli import main
from diffjax.config import load_config
from diffjax.data.image_io import to_float, to_uint8
from diffjax.evaluation import metrics
from diffjax.inference.autoencoder import (
    autoencoder_codec,
    is_autoencoder,
    load_autoencoder,
    save_autoencoder,
)
from diffjax.nn.autoencoder import kl_divergence
from diffjax.training.trainer import load_data

SIDE = 12
OWN = """
from diffjax.config import Config, Data, Train
from diffjax.nn.autoencoder import AutoencoderConfig

config = Config(
    data=Data(source="npz", path={path!r}, conditions=()),
    network=AutoencoderConfig(
        channels=(4,), blocks=1, latent_channels=2, norm_groups=1, middle_attention=False,
        scaling=2.0, shift=0.25,
    ),
    train=Train(
        steps=60, batch=16, learning_rate=1e-2, warmup=0, decay="none", ema=(0.9,),
        eval_every=20, preview_every=60, save_every=60, steps_per_dispatch=20,
    ),
)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a configuration, of 160 grey images of one bright half each."""
    folder = tmp_path_factory.mktemp("autoencoders")
    r = np.random.default_rng(0)
    x = np.zeros((160, SIDE, SIDE), np.uint8)
    for i in range(160):
        half = slice(0, 6) if i % 2 else slice(6, 12)
        x[i, half] = r.integers(100, 255)
        x[i, :, r.integers(0, SIDE)] = 255
    np.savez(folder / "halves.npz", x=x, y=np.arange(160) % 2)
    path = folder / "own.py"
    path.write_text(OWN.format(path=str(folder / "halves.npz")))
    return path


@pytest.fixture(scope="module")
def run(config):
    """A run without weight of the divergence."""
    folder = config.parent / "sharp"
    main(["train", str(config), "--workdir", str(folder), "--network.kl-weight", "0"])
    return folder


@pytest.fixture(scope="module")
def collapsed(run):
    """A copy of the run, resumed with a large weight of the divergence, in another mode."""
    folder = run.parent / "collapsed"
    shutil.copytree(run, folder)
    words = ["--network.kl-weight", "100", "--train.parallel", "jit", "--train.preview-every", "0"]
    main(["train", "--resume", str(folder), "--train.steps", "100", *words])
    return folder


def images_of(config):
    held_out = load_data(load_config(str(config))).held_out
    return np.stack([held_out[i]["image"] for i in range(len(held_out))])


def applied(autoencoder, images):
    """The moments of images, and their reconstructions."""
    module = autoencoder.config.build(images.shape[1:])

    @jax.jit
    def apply(params):
        moments = module.apply({"params": params}, images, method="encode")
        return moments, module.apply({"params": params}, images)

    return map(np.asarray, apply(autoencoder.params))


def metrics_of(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def test_training(run, config):
    """The error falls; the preview shows images and reconstructions."""
    held_out = metrics_of(run, "held_out_loss")
    assert list(held_out) == [20, 40, 60]
    assert held_out[60] < held_out[20]
    assert held_out[60] < 0.5 * np.abs(to_float(images_of(config))).mean()
    assert metrics_of(run, "loss_q1") == {}
    picture = np.asarray(Image.open(run / "previews" / "0000060.png").convert("L"))
    autoencoder, images = load_autoencoder(run), images_of(config)[:1]
    codec = autoencoder_codec(autoencoder)
    for image in (images, to_uint8(codec.decode(codec.encode(to_float(images))))):
        large = image[0, :, :, 0].repeat(4, 0).repeat(4, 1).astype(int)
        windows = np.lib.stride_tricks.sliding_window_view(picture, large.shape).astype(int)
        assert np.abs(windows - large).max((2, 3)).min() <= 1  # of 255


def test_weight_of_the_divergence(run, collapsed, config):
    """With a large one latents become standard normal, and say nothing of the image.

    Resuming may change it.
    """
    assert list(metrics_of(collapsed, "held_out_loss")) == [20, 40, 60, 80, 100]
    found = []
    for folder in (run, collapsed):
        autoencoder, images = load_autoencoder(folder), to_float(images_of(config))
        moments, _ = applied(autoencoder, images)
        codec = autoencoder_codec(autoencoder)
        error = np.abs(codec.decode(codec.encode(images)) - images).mean()
        found.append((float(kl_divergence(moments).mean()) / moments[0].size * 2, error))
    (sharp, error), (flat, other) = found
    assert flat < 0.1 < sharp
    assert error < 0.8 * other


def test_codec_and_files(run, config, tmp_path):
    """x is the mean of latents, shifted and scaled; files have the same autoencoder."""
    autoencoder, images = load_autoencoder(run), to_float(images_of(config))
    codec, (moments, decoded) = autoencoder_codec(autoencoder, 8), applied(autoencoder, images)
    x = codec.encode(images)
    assert x.shape == (len(images), SIDE, SIDE, 2)
    np.testing.assert_allclose(x, (moments[..., :2] - 0.25) * 2, atol=1e-4)
    np.testing.assert_allclose(codec.decode(x), np.clip(decoded, -1, 1), atol=1e-4)
    assert np.abs(codec.decode(100 * x)).max() <= 1
    assert codec.bounds is None
    save_autoencoder(tmp_path / "vae", autoencoder)
    for source in (tmp_path / "vae", f"hf:{tmp_path}/vae"):
        stored = load_autoencoder(source)
        assert is_autoencoder(source)
        assert (stored.checksum, stored.config.scaling) == (autoencoder.checksum, 2)
        np.testing.assert_allclose(autoencoder_codec(stored).encode(images), x, atol=1e-5)


def test_evaluate(run, config, tmp_path, capsys):
    """The row has the figures of images and reconstructions of 8 bits, and its whole context."""
    out = tmp_path / "rows.jsonl"
    words = ["evaluate", str(run), "--features", "pixels", "--out", str(out)]
    main([*words, "--reference", "held_out", "--batch", "8", "--report", str(tmp_path / "row.md")])
    main([*words, "--num", "5", "--weights", "raw"])
    row, few = map(json.loads, out.read_text().splitlines())
    images, codec = images_of(config), autoencoder_codec(load_autoencoder(run))
    others = to_uint8(codec.decode(codec.encode(to_float(images))))
    error = np.mean((images.astype(float) - others) ** 2)
    assert row["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)
    assert row["ssim"] == pytest.approx(metrics.structural_similarity(images, others).mean(), 1e-3)
    moments = [
        metrics.Moments.empty(SIDE**2).update(each.reshape(len(each), -1) / 255)
        for each in (images, others)
    ]
    assert row["fd"] == pytest.approx(metrics.frechet_distance(*moments), rel=1e-2)
    assert row["images_fd"] < 1e-6 < few["images_fd"]
    assert (row["images"], few["images"], row["batch"]) == (len(images), 5, 8)
    assert (row["latent_size"], row["image_size"], row["scaling"]) == ("12x12x2", "12x12x1", 2)
    assert (row["weights"][:12], few["weights"][:12]) == ("ema, step 60", "raw, step 60")
    text = (tmp_path / "row.md").read_text()
    assert f"{row['psnr']:.2f}" in text
    assert "PSNR" in capsys.readouterr().out


def test_images_of_a_published_one_have_moved(run, config, tmp_path):
    """Its configuration names a file that is not there, and the path the one that is."""
    save_autoencoder(tmp_path / "theirs", load_autoencoder(run))
    lost = tmp_path / "lost.py"
    lost.write_text(OWN.format(path=str(tmp_path / "absent.npz")))
    out, moved = tmp_path / "rows.jsonl", config.parent / "halves.npz"
    words = ["evaluate", f"hf:{tmp_path / 'theirs'}", "--features", "pixels", "--num", "5"]
    main([*words, "--data.config", str(lost), "--data.path", str(moved), "--out", str(out)])
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["images"], row["image_size"]) == (5, "12x12x1")


BAD = {
    "sample {run}": ("autoencoder",),
    "frontier {run}": ("autoencoder",),
    "likelihood {run}": ("autoencoder",),
    "edit interpolate {run}": ("autoencoder",),
    "distill {run} --workdir {run}/students": ("autoencoder",),
    "evaluate {run} --steps 5": ("steps", "5", "autoencoder"),
    "evaluate {run} --sampler ddim": ("sampler", "ddim", "autoencoder"),
    "evaluate {run} --guidance 2": ("guidance", "2.0", "autoencoder"),
    "evaluate {run} --seed 4": ("seed", "4", "autoencoder"),
    "evaluate {run} --no-clip": ("clip", "False", "autoencoder"),
    "evaluate {run} --batch 0": ("batch", "0"),
    "evaluate {run} --num 3 --features pixels": ("num", "3", "4"),
    "train {config} --workdir {run}/x --data.conditions label": ("data.conditions", "label"),
    "train {config} --workdir {run}/x --diffusion.T 10": ("diffusion.T", "10"),
    "train {config} --workdir {run}/x --train.weighting edm": ("train.weighting", "edm"),
    "train {config} --workdir {run}/x --train.times stratified": ("train.times", "stratified"),
    "train {config} --workdir {run}/x --train.condition-dropout 0.2": (
        "train.condition_dropout",
        "0.2",
    ),
}


@pytest.mark.parametrize("command", BAD)
def test_mistakes(command, run, config, capsys):
    """A command or an option that an autoencoder has not is told in one line."""
    check_mistake(main, command, BAD[command], capsys, run=run, config=config)
