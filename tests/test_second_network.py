"""A network of another package, conditioned on a pytree, goes through every program."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import check_mistake, naming
from PIL import Image

from diffjax.cli import main
from diffjax.inference.model import load_model
from diffjax.nn import registry

PLUGIN = Path(__file__).parent / "plugin"
OWN = """
from mixer import MixerConfig

from diffjax.config import Config, Data, Diffusion, Train

config = Config(
    data=Data(source="npz", path={path!r}, conditions=("label", "shade")),
    network=MixerConfig(width=32),
    diffusion=Diffusion(prediction="v"),
    train=Train(
        steps=500, batch=64, learning_rate=4e-3, warmup=10, eval_every=200, preview_every=200,
        save_every=200, ema=(0.95,), condition_dropout=0.2,
    ),
)
"""


@pytest.fixture(scope="module")
def plugin():
    """The other package, as if it were installed; nothing of it stays registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLUGIN))
        patch.setattr(registry, "NETWORKS", {"unet": registry.NETWORKS["unet"]})
        yield


@pytest.fixture(scope="module")
def mixer_run(plugin, tmp_path_factory):
    """A trained mixer: the label says which half is bright, the vector how bright it is."""
    folder = tmp_path_factory.mktemp("mixer")
    r = np.random.default_rng(0)
    label, shade = r.integers(0, 2, 400), r.uniform(0.2, 1, (400, 2)).astype(np.float32)
    x = np.zeros((400, 8, 8), np.uint8)
    for i in range(400):
        half = slice(0, 4) if label[i] == 0 else slice(4, 8)
        x[i, :, half] = np.round(255 * shade[i, 0])
    np.savez(folder / "shades.npz", x=x, y=label, shade=shade)
    (folder / "own.py").write_text(OWN.format(path=str(folder / "shades.npz")))
    run = folder / "run"
    main(["train", str(folder / "own.py"), "--workdir", str(run), "--train.steps", "200"])
    (folder / "own.py").unlink()
    main(["train", "--resume", str(run), "--train.steps", "500"])
    return run


def test_training_resumes(mixer_run):
    """The second command goes on from step 200, to a lower held-out loss; previews are pictures."""
    lines = [json.loads(line) for line in (mixer_run / "metrics.jsonl").read_text().splitlines()]
    held_out = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert set(held_out) == {200, 400, 500}
    assert held_out[500] < held_out[200]
    assert Image.open(mixer_run / "previews" / "0000500.png").size[0] > 100
    model = load_model(mixer_run)
    assert (model.step, model.name) == (500, "mixer of run")
    assert jax.tree.structure(model.info.conditioning.zeros(1)) == jax.tree.structure(
        {"label": 0, "shade": 0}
    )


def sample(run, out, condition, *options):
    arguments = ["--condition", condition, "--num", "8", "--steps", "20", "--save", str(out)]
    arguments += ["--out", str(out.with_suffix(".png")), *options]
    main(["sample", str(run), *arguments])
    return np.load(out)["images"].astype(float)


def test_both_parts_of_a_condition_arrive(mixer_run, tmp_path):
    """The label chooses the bright half, and the vector its brightness; guidance enlarges both."""
    left = sample(mixer_run, tmp_path / "a.npz", "label=0;shade=0.9,0.5", "--guidance", "1.5")
    right = sample(mixer_run, tmp_path / "b.npz", "label=1;shade=0.9,0.5", "--guidance", "1.5")
    dark = sample(mixer_run, tmp_path / "c.npz", "label=1;shade=0.3,0.5", "--guidance", "1.5")
    assert left[:, :, :4].mean() > 1.5 * left[:, :, 4:].mean()
    assert right[:, :, 4:].mean() > 1.5 * right[:, :, :4].mean()
    assert right[:, :, 4:].mean() > dark[:, :, 4:].mean() + 30


def test_frontier_and_evaluate(mixer_run, tmp_path, capsys):
    """Conditions come from the data, since vectors cannot be enumerated."""
    common = ["--features", "pixels", "--num", "40", "--batch", "8"]
    main(["evaluate", str(mixer_run), "--steps", "4", "--guidance", "2", *common])
    (row,) = map(json.loads, (mixer_run / "evaluations.jsonl").read_text().splitlines())
    assert (row["steps"], row["nfe"], row["guidance"]) == (4, 8, 2.0)
    out = tmp_path / "report"
    sweep = ["--sampler", "ddim,heun", "--steps", "3", "--guidance", "1,2", *common]
    main(["frontier", str(mixer_run), *sweep, "--out", str(out)])
    rows = json.loads((out / "frontier.json").read_text())
    assert sorted((r["nfe"], r["guidance"]) for r in rows) == [(3, 1), (5, 1), (6, 2), (10, 2)]
    capsys.readouterr()


def test_distillation(mixer_run, tmp_path):
    """Guidance goes into the student's condition, a pair of the pytree and the scale."""
    options = ["--guidance", "2", "--start", "4", "--end", "2", "--train.steps", "4"]
    options += ["--train.preview-every", "4", "--train.eval-every", "0", "--train.save-every", "4"]
    main(["distill", str(mixer_run), "--workdir", str(tmp_path / "students"), *options])
    student = load_model(tmp_path / "students" / "2")
    assert student.info.config.distillation.steps == 2
    one = sample(
        student_run := tmp_path / "students" / "2", tmp_path / "s.npz", "label=0;shade=1,1"
    )
    assert one.shape == (8, 8, 8, 1)
    assert student_run.is_dir()


def test_dry_run(mixer_run, tmp_path, capsys):
    """The train step and the sampler compile for shapes alone."""
    r = np.random.default_rng(0)
    data = {"x": r.integers(0, 255, (50, 8, 8), np.uint8), "y": np.arange(50) % 2}
    np.savez(tmp_path / "d.npz", **data, shade=r.normal(size=(50, 2)))
    (tmp_path / "own.py").write_text(OWN.format(path=str(tmp_path / "d.npz")))
    main(["dry-run", str(tmp_path / "own.py"), "--target", "cpu"])
    assert "all-reduce" in capsys.readouterr().out


BAD = {
    "sample {run} --condition label=2;shade=1,1": ("condition", "1"),
    "sample {run} --condition label=0": ("condition", "shade"),
    "sample {run} --condition label=0;shade=1": ("condition", "2"),
    "sample {run}": ("shade", "2"),
}


@pytest.mark.parametrize("command", BAD)
def test_bad_conditions(command, mixer_run, capsys):
    check_mistake(main, command, BAD[command], capsys, run=mixer_run)


def test_a_network_that_is_not_installed_is_named(mixer_run, monkeypatch):
    monkeypatch.setattr(registry, "NETWORKS", {"unet": registry.NETWORKS["unet"]})
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **select: [])
    with pytest.raises(ValueError, match=naming("mixer", "diffjax.networks")):
        load_model(mixer_run)
