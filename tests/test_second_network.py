"""A DiT, conditioned on a pytree, and a network of another package go through the programs."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import QUIET, check_mistake, naming
from PIL import Image

from diffjax.cli import main
from diffjax.inference.model import load_model
from diffjax.nn import registry

PLUGIN = Path(__file__).parent / "plugin"
OWN = """
{imports}
from diffjax.config import Config, Data, Diffusion, Train

config = Config(
    data=Data(source="npz", path={path!r}, conditions=("label", "shade")),
    network={network},
    diffusion=Diffusion(prediction="v"),
    train=Train(
        steps=400, batch=64, learning_rate=4e-3, warmup=10, eval_every=200, preview_every=200,
        save_every=200, ema=(0.95,), condition_dropout=0.2,
    ),
)
"""
DIT = {
    "imports": "from diffjax.nn.dit import DiTConfig",
    "network": "DiTConfig(width=32, depth=1, heads=2, patch=4)",
}
MIXER = {"imports": "from mixer import MixerConfig", "network": "MixerConfig(width=4, depth=1)"}


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """Images of which the label says which half is bright, and the vector how bright it is."""
    path = tmp_path_factory.mktemp("data") / "shades.npz"
    r = np.random.default_rng(0)
    label, shade = r.integers(0, 2, 400), r.uniform(0.2, 1, (400, 2)).astype(np.float32)
    x = np.zeros((400, 8, 8), np.uint8)
    for i in range(400):
        half = slice(0, 4) if label[i] == 0 else slice(4, 8)
        x[i, :, half] = np.round(255 * shade[i, 0])
    np.savez(path, x=x, y=label, shade=shade)
    return path


@pytest.fixture(scope="module")
def dit_run(shades, tmp_path_factory):
    """A trained DiT."""
    folder = tmp_path_factory.mktemp("dit")
    (folder / "own.py").write_text(OWN.format(path=str(shades), **DIT))
    run = folder / "run"
    main(["train", str(folder / "own.py"), "--workdir", str(run), "--train.steps", "200"])
    (folder / "own.py").unlink()
    main(["train", "--resume", str(run), "--train.steps", "400"])
    return run


def test_training_resumes(dit_run):
    """The second command goes on from step 200, to a lower held-out loss; previews are pictures."""
    lines = [json.loads(line) for line in (dit_run / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert set(held_out) == {200, 400}
    assert held_out[400] < held_out[200]
    assert Image.open(dit_run / "previews" / "0000400.png").size[0] > 100
    model = load_model(dit_run)
    assert (model.step, model.name) == (400, "dit of run")
    assert jax.tree.structure(model.info.conditioning.zeros(1)) == jax.tree.structure(
        {"label": 0, "shade": 0}
    )


def sample(run, out, condition, *options):
    arguments = ["--condition", condition, "--num", "8", "--steps", "20", "--save", str(out)]
    arguments += ["--out", str(out.with_suffix(".png")), *options]
    main(["sample", str(run), *arguments])
    return np.load(out)["images"].astype(float)


def test_both_parts_of_a_condition_arrive(dit_run, tmp_path):
    """The label chooses the bright half, and the vector its brightness; guidance enlarges both."""
    left = sample(dit_run, tmp_path / "a.npz", "label=0;shade=0.9,0.5", "--guidance", "1.5")
    right = sample(dit_run, tmp_path / "b.npz", "label=1;shade=0.9,0.5", "--guidance", "1.5")
    dark = sample(dit_run, tmp_path / "c.npz", "label=1;shade=0.3,0.5", "--guidance", "1.5")
    assert left[:, :, :4].mean() > 1.5 * left[:, :, 4:].mean()
    assert right[:, :, 4:].mean() > 1.5 * right[:, :, :4].mean()
    assert right[:, :, 4:].mean() > dark[:, :, 4:].mean() + 30


def test_frontier_and_evaluate(dit_run, tmp_path, capsys):
    """Conditions come from the data, since vectors cannot be enumerated."""
    common = ["--features", "pixels", "--num", "40", "--batch", "8"]
    main(["evaluate", str(dit_run), "--steps", "4", "--guidance", "2", *common])
    (row,) = map(json.loads, (dit_run / "evaluations.jsonl").read_text().splitlines())
    assert (row["steps"], row["nfe"], row["guidance"]) == (4, 8, 2.0)
    out = tmp_path / "report"
    sweep = ["--sampler", "ddim,heun", "--steps", "3", "--guidance", "1,2", *common]
    main(["frontier", str(dit_run), *sweep, "--out", str(out)])
    rows = json.loads((out / "frontier.json").read_text())
    assert sorted((r["nfe"], r["guidance"]) for r in rows) == [(3, 1), (5, 1), (6, 2), (10, 2)]
    capsys.readouterr()


def test_distillation(dit_run, tmp_path):
    """Guidance goes into the student's condition, a pair of the pytree and the scale."""
    options = ["--guidance", "2", "--start", "4", "--end", "2", "--train.steps", "4"]
    options += ["--train.preview-every", "4", "--train.eval-every", "0", "--train.save-every", "4"]
    main(["distill", str(dit_run), "--workdir", str(tmp_path / "students"), *options])
    student = load_model(tmp_path / "students" / "2")
    assert student.info.config.distillation.steps == 2
    one = sample(
        student_run := tmp_path / "students" / "2", tmp_path / "s.npz", "label=0;shade=1,1"
    )
    assert one.shape == (8, 8, 8, 1)
    assert student_run.is_dir()


def test_edit(dit_run, tmp_path):
    """The bright half that is kept tells how bright the rest of it is; images go over to others."""
    common = ["--num", "2", "--steps", "4"]
    words = ["inpaint", str(dit_run), "--mask", "bottom", "--resample", "1", *common]
    main(["edit", *words, "--out-dir", str(tmp_path / "inpainted")])
    words = ["interpolate", str(dit_run), "--between", "1", *common]
    main(["edit", *words, "--out-dir", str(tmp_path / "between")])
    for name, count in (("inpainted", 2), ("between", 3)):
        paths = sorted((tmp_path / name).iterdir())
        assert [Image.open(path).size for path in paths] == [(8, 8)] * count


def test_likelihood(dit_run, tmp_path):
    """Bits per dimension of held-out images, along the flow and by the bound."""
    out = tmp_path / "bits.json"
    words = ["--num", "2", "--repeats", "1", "--tolerance", "0.01", "--out", str(out)]
    main(["likelihood", str(dit_run), *words])
    assert all(np.isfinite(row["bits_per_dim"]) for row in json.loads(out.read_text()))


def test_dry_run(shades, tmp_path, capsys):
    """The train step and the sampler compile for shapes alone."""
    (tmp_path / "own.py").write_text(OWN.format(path=str(shades), **DIT))
    words = ["--target", "cpu", "--network.depth", "2", "--network.scan", "--network.remat"]
    main(["dry-run", str(tmp_path / "own.py"), *words])
    assert "all-reduce" in capsys.readouterr().out


BAD = {
    "sample {run} --condition label=2;shade=1,1": ("condition", "1"),
    "sample {run} --condition label=0": ("condition", "shade"),
    "sample {run} --condition label=0;shade=1": ("condition", "2"),
    "sample {run}": ("shade", "2"),
}


@pytest.mark.parametrize("command", BAD)
def test_bad_conditions(command, dit_run, capsys):
    check_mistake(main, command, BAD[command], capsys, run=dit_run)


@pytest.fixture
def plugin(monkeypatch):
    """The other package, as if it were installed; nothing of it stays registered."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))


def test_a_network_of_another_package(plugin, shades, tmp_path, monkeypatch):
    """It trains, is found by its entry point, and is named where it is not installed."""
    (tmp_path / "own.py").write_text(OWN.format(path=str(shades), **MIXER))
    words = ["--workdir", str(tmp_path / "run"), "--train.steps", "1", *QUIET]
    main(["train", str(tmp_path / "own.py"), *words])
    for name in ("mixer", "small"):
        registry.NETWORKS.pop(name, None)
    model = load_model(tmp_path / "run")
    assert (model.name, model.info.config.network.width) == ("mixer of run", 4)
    monkeypatch.setattr(registry, "NETWORKS", {"unet": registry.NETWORKS["unet"]})
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **select: [])
    with pytest.raises(ValueError, match=naming("mixer", "diffjax.networks")):
        load_model(tmp_path / "run")
