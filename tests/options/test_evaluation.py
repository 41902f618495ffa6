"""Options of `diffjax evaluate`, `frontier` and `likelihood`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import likelihood, sampler, schedule
from diffjax.cli import main
from diffjax.data import image_io
from diffjax.evaluation import bits_per_dim, features, quality
from diffjax.evaluation.sweep import Sweep
from diffjax.inference.pipeline import Clip
from diffjax.likelihood import Likelihood
from tests.options.observations import observes
from tests.options.probe import call, is_same, words_of

LEVELS = schedule.cosine(20)
MEASURE = quality, "measure"
PIXELS = "--features pixels --num 80"


def measured(run, *words):
    """The model, real images, plan and request that `evaluate` measures."""
    model, _, reference, plan, _, request, *_ = call(MEASURE, "evaluate", run, PIXELS, *words).args_
    return model, reference, plan, request


def is_ddim(plan, steps, eta=0.0):
    return is_same(plan, sampler.ddim(LEVELS, schedule.trailing(LEVELS, steps), eta))


@observes("evaluate model", "evaluate --weights", "evaluate --checkpoint")
def test_weights(run, other_run):
    """The parameters are those of the run, the checkpoint and the average that are named."""
    cases = {"": 0.5, "--weights raw": 0.4, "--checkpoint 3 --weights 0.5": 0.3}
    for words, value in cases.items():
        assert float(measured(run, words)[0].params["idle"]) == np.float32(value)
    assert float(measured(other_run)[0].params["idle"]) == np.float32(0.95)


@observes(
    "evaluate --sampler", "evaluate --steps", "evaluate --guidance", "evaluate --num",
    "evaluate --batch", "evaluate --seed", "evaluate --clip",
)  # fmt: skip
def test_request(run):
    """The plan and the request are those that are asked for."""
    _, _, plan, request = measured(run)
    assert is_ddim(plan, 20)
    assert (request.num, request.batch, request.seed) == (80, 16, 0)
    assert (request.guidance.scale, request.bound) == (1, Clip())
    words = "--steps 6 --sampler ddim(eta=0.7) --guidance 2.5 --num 99 --batch 8 --seed 13"
    _, _, plan, request = measured(run, words, "--no-clip")
    assert is_ddim(plan, 6, 0.7)
    assert (request.num, request.batch, request.seed) == (99, 8, 13)
    assert (request.guidance.scale, request.bound) == (2.5, None)
    assert (request.condition == np.arange(99) % 10).all()


def pixels_of(images, change=lambda x: x):
    """The set of the images of a file, changed."""
    return {change(image).tobytes() for image in np.load(images)["x"]}


def seen(reference):
    """The real images that a reference has."""
    return {
        np.asarray(reference.source[i]["image"]).tobytes() for i in range(len(reference.source))
    }


@observes(
    "evaluate --reference", "evaluate --data.path", "evaluate --data.config",
    "frontier --reference", "frontier --data.path",
)  # fmt: skip
def test_real_images(run, images, probe_config, tmp_path):
    """They are those of the split, of the data where they are now."""
    held_out = seen(measured(run, "--reference held_out")[1])
    train = seen(measured(run, "--reference train")[1])
    assert held_out | train == pixels_of(images)
    assert not held_out & train
    assert 8 <= len(held_out) < 30 < len(train)
    stored, path = np.load(images), tmp_path / "digits"
    with path.open("wb") as file:
        np.savez(file, x=stored["x"][:, ::-1], y=stored["y"])
    turned = pixels_of(images, lambda x: x[::-1])
    assert seen(measured(run, "--data.path", path)[1]) <= turned
    config = tmp_path / "other.py"
    config.write_text(probe_config.read_text().replace(str(images), str(path)))
    assert seen(measured(run, "--data.config", config)[1]) <= turned
    for words, known in (("", train), ("--reference held_out", held_out)):
        assert seen(swept(run, tmp_path, words)[0].reference) == known
    assert seen(swept(run, tmp_path, "--data.path", path)[0].reference) <= turned


@pytest.mark.parametrize("command", ["evaluate", "frontier"])
@observes(
    "evaluate --features", "evaluate --inception", "frontier --features", "frontier --inception"
)
def test_features(command, run, tmp_path):
    """The features are the pixels, those of a classifier, or of Inception with these weights."""
    words = (command, run, "--num 80 --steps 3 --out", tmp_path / "out")
    words += ("--sampler ddim",) if command == "frontier" else ()
    inception = call((features, "inception"), *words, "--features inception --inception a/b.pth")
    assert str(inception.args_[0]) == "a/b.pth"
    assert call((features, "inception"), *words, "--features inception").args_ == (None,)
    for option in ("", "--features cnn"):
        train, held_out, *_ = call((features, "small_cnn"), *words, option).args_
        assert 8 <= len(held_out) < 30 < len(train) < 160
    call((features, "pixels"), *words, "--features pixels")


@observes("evaluate --out", "evaluate --report")
def test_row(run, tmp_path):
    """The row of the options is appended to the file that is named."""
    for seed in (3, 4):
        main(words_of("evaluate", run, PIXELS, "--batch 16 --steps 1 --seed", seed, "--out",
                      tmp_path / "rows.jsonl", "--report", tmp_path / "row.md"))  # fmt: skip
    assert "ddim(eta=0, trailing)" in (tmp_path / "row.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["images"], row["batch"], row["steps"]) for row in rows] == [
        (3, 80, 16, 1),
        (4, 80, 16, 1),
    ]


class Swept:
    """What `frontier` measures for one row."""

    def __init__(self, model, pipeline, reference, plan, name, request, hooks=None):
        self.model, self.reference, self.plan, self.request = model, reference, plan, request

    def key(self):
        """The sampler, the weights, the guidance scale and the seed."""
        value = round(float(self.model.params["idle"]), 3)
        return name_of(self.plan), value, self.request.guidance.scale, self.request.seed


def swept(run, folder, *words, models=()):
    """What `frontier` measures, row by row, without measuring it."""
    found = []

    def measure(*args):
        found.append(Swept(*args))
        num, batch = found[-1].request.num, found[-1].request.batch
        args[-1].progress(found[-1].plan.steps * -(-num // batch))
        return None, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "measure", measure)
        patch.setattr(Sweep, "_add", lambda *args: None)
        patch.setattr(Sweep, "write_report", lambda sweep: "")
        words = words_of("frontier", run, *models, PIXELS, "--out", folder / "sweep", *words)
        if "--sampler" not in words:
            words += ["--sampler", "ddim:3", "--guidance", "1"]
        main(words)
    return found


@observes(
    "frontier models", "frontier --weights", "frontier --sampler", "frontier --steps",
    "frontier --guidance", "frontier --seed", "frontier --num", "frontier --batch",
    "frontier --clip",
)  # fmt: skip
def test_sweep(run, other_run, tmp_path):
    """Every combination is measured, each as it is asked for."""
    words = "--sampler ddim(eta=0.5),euler:4 --steps 2,6 --guidance 0,3 --seed 5,8 --weights raw"
    words += " --num 91 --batch 8 --no-clip"
    found = swept(run, tmp_path, words, models=[other_run])
    assert {(each.request.num, each.request.batch, each.request.bound) for each in found} == {
        (91, 8, None)
    }
    expected = {
        (name, value, scale, seed)
        for name in ("ddim 2", "ddim 6", "euler 4")
        for value in (0.4, 0.9)
        for scale in (0, 3)
        for seed in (5, 8)
    }
    assert {each.key() for each in found} == expected
    assert len(found) == len(expected)
    (plain,) = swept(run, tmp_path)
    assert (plain.request.bound, plain.request.seed, plain.request.batch) == (Clip(), 0, 16)
    assert float(plain.model.params["idle"]) == np.float32(0.5)


def name_of(plan):
    """The name of a plan among those of the sweep."""
    for steps in (2, 6):
        if is_ddim(plan, steps, 0.5):
            return f"ddim {steps}"
    assert is_same(plan, sampler.euler(LEVELS, schedule.trailing(LEVELS, 4)))
    return "euler 4"


@observes("frontier --out")
def test_sweep_folder(run, tmp_path):
    """The files are in the folder that is named."""
    words = "--num 40 --batch 8 --features pixels --steps 1 --guidance 1 --sampler ddim"
    main(words_of("frontier", run, words, "--out", tmp_path))
    (row,) = json.loads((tmp_path / "frontier.json").read_text())
    assert (row["images"], row["batch"], row["guidance"], row["steps"]) == (40, 8, 1, 1)
    assert (tmp_path / "report.html").exists()


# ------------------------------------------------------------------------------- likelihood

SEVEN = "--evaluations 5 --num 7"
LIKELIHOOD = bits_per_dim, "measure_bits_per_dim"


@observes(
    "likelihood model", "likelihood --weights", "likelihood --checkpoint", "likelihood --num",
    "likelihood --condition", "likelihood --data.path",
)  # fmt: skip
def test_likelihood_of(run, other_run, images, tmp_path):
    """So many held-out images of the data, with their labels or without, under those weights."""
    stored, known = np.load(images), pixels_of(images)
    model, x, condition, *_ = call(LIKELIHOOD, "likelihood", run, SEVEN).args_
    pixels = image_io.to_uint8(x)
    assert len(x) == 7
    assert {image.tobytes() for image in pixels} <= known
    labels = [stored["y"][(stored["x"] == image).all((1, 2, 3))][0] for image in pixels]
    assert condition.tolist() == labels
    assert float(model.params["idle"]) == np.float32(0.5)
    assert call(LIKELIHOOD, "likelihood", run, SEVEN, "--no-condition").args_[2] is None
    with (tmp_path / "digits").open("wb") as file:
        np.savez(file, x=stored["x"][:, ::-1], y=stored["y"])
    path = tmp_path / "digits"
    _, x, *_ = call(LIKELIHOOD, "likelihood", run, SEVEN, "--data.path", path).args_
    assert {image[::-1].tobytes() for image in image_io.to_uint8(x)} <= known
    cases = {"--weights raw": 0.4, "--checkpoint 3 --weights 0.5": 0.3}
    for words, value in cases.items():
        model = call(LIKELIHOOD, "likelihood", run, SEVEN, words).args_[0]
        assert float(model.params["idle"]) == np.float32(value)
    model = call(LIKELIHOOD, "likelihood", other_run, SEVEN).args_[0]
    assert float(model.params["idle"]) == np.float32(0.95)


@observes(
    "likelihood --probes", "likelihood --repeats", "likelihood --tolerance",
    "likelihood --evaluations", "likelihood --variance", "likelihood --seed", "likelihood --out",
    "likelihood --report",
)  # fmt: skip
def test_likelihood(run, tmp_path, monkeypatch):
    """They arrive in the flow and in the bound, and all that is drawn is keyed by the seed."""
    flows, bounds = [], []

    def drawn(keys):
        return jax.vmap(jax.random.normal)(keys)

    def log_density(denoise, levels, x0, condition, keys, probes, tolerance):
        flows.append((probes, tolerance))
        return Likelihood(drawn(keys), jnp.ones(len(x0)), jnp.ones(len(x0), bool))

    def bound(denoise, levels, t, x0, condition, keys, std, evaluations, bin_width):
        assert bin_width == likelihood.BIN  # of pixels
        bounds.append((std, evaluations))
        return drawn(keys)

    monkeypatch.setattr(likelihood, "log_density", log_density)
    monkeypatch.setattr(likelihood, "variational_bound", bound)
    found = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / f"{name}.json"
        words = "--num 8 --probes 5 --repeats 2 --tolerance 0.003 --evaluations 11 --seed"
        files = f"--out {out} --report {tmp_path}/{name}.md"
        main(words_of("likelihood", run, words, seed, "--variance fixed_small", files))
        found[name] = json.loads(out.read_text())
    assert "ddpm(fixed_small)" in (tmp_path / "a.md").read_text()
    assert set(flows) == {(5, 0.003)}
    assert {evaluations for _, evaluations in bounds} == {11}
    level, lower = schedule.at(LEVELS, 9), schedule.at(LEVELS, 8)
    assert {float(std(level, lower)) for std, _ in bounds} == {sampler.fixed_small(level, lower)}
    flow, bounded = found["a"]
    assert (flow["repeats"], flow["images"]) == (2, 8)
    assert found["a"] == found["b"]
    for ours, other in zip(found["a"], found["c"], strict=True):
        assert ours["bits_per_dim"] != other["bits_per_dim"]
    assert bounded["evaluations"] == 12
