"""Options of `diffjax sample`: what arrives in the pipeline, and what comes out of it.

The probe predicts x0 as a row of its table, so that the sample is the last estimate of x0: guided,
bounded, and else untouched.
"""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax import sampler, schedule
from diffjax.data import image_io
from diffjax.inference import pipeline
from diffjax.inference.pipeline import Pipeline
from tests.options.observations import observes
from tests.options.probe import SHAPE, call, calls, is_same, table_of

LEVELS = schedule.cosine(20)
CALL = Pipeline, "__call__"
SAMPLE = Pipeline.__call__


def asked(run, *words):
    """The parameters, plan, request and hooks that arrive in the pipeline."""
    return call(CALL, "sample", run, *words).args_[1:]


def sampled(run, *words, num=10):
    """x of the samples, float32 [num, ...], of each class in turn."""
    results = []

    def sample(*args):
        results.append(SAMPLE(*args))
        return results[0]

    calls(CALL, "sample", run, "--num", num, "--steps 2", *words, function=sample)
    return results[0].x


def ddim(t):
    return sampler.ddim(LEVELS, t)


@observes("sample model", "sample --weights", "sample --checkpoint")
def test_weights(run, other_run):
    """The parameters are those of the run, the checkpoint and the average that are named."""
    cases = {
        "": 0.5,
        "--weights raw": 0.4,
        "--weights 0.5": 0.6,
        "--checkpoint 3": 0.2,
        "--checkpoint 3 --weights 0.5": 0.3,
    }
    found = {words: float(asked(run, words)[0]["idle"]) for words in cases}
    assert found == pytest.approx(cases)
    assert float(asked(other_run)[0]["idle"]) == pytest.approx(0.95)


@observes("sample --sampler", "sample --steps", "sample --levels", "sample --plan")
def test_plan(run, tmp_path):
    """The plan is that of the sampler and the levels that are named."""
    trailing, leading = (schedule.SPACINGS[name] for name in ("trailing", "leading"))
    t = np.array([19, 10.5, 2])
    cases = {
        "": ddim(trailing(LEVELS, 20)),
        "--steps 7": ddim(trailing(LEVELS, 7)),
        "--sampler euler:4": sampler.euler(LEVELS, trailing(LEVELS, 4)),
        "--sampler ddpm(spacing=leading) --steps 5": sampler.ddpm(LEVELS, leading(LEVELS, 5)),
        "--levels 19,10.5,2": ddim(t),
        "--levels 19,10.5,2 --sampler euler": sampler.euler(LEVELS, t),
    }
    for words, plan in cases.items():
        assert is_same(asked(run, words)[1], plan), words
    path = tmp_path / "plan.json"
    columns = {name: column.tolist() for name, column in ddim(t).level._asdict().items()}
    columns |= {name: getattr(ddim(t), name).tolist() for name in ("a", "b", "c", "noise_index")}
    path.write_text(json.dumps(columns | {"d": None}))
    assert is_same(asked(run, "--plan", path)[1], ddim(t))


@observes(
    "sampler ddim(eta)",
    "sampler ddpm(variance)",
    "sampler dpm_solver_pp_2m(eta)",
    "sampler edm(s_churn)",
)
def test_sampler_options(run):
    """The noise of the plan is that of the option."""

    def noise(text):
        plan = asked(run, "--steps 5 --sampler", text)[1]
        return np.zeros(plan.steps) if plan.d is None else plan.d

    t = schedule.trailing(LEVELS, 5)
    level, lower = schedule.at(LEVELS, t[:-1]), schedule.at(LEVELS, t[1:])
    small, large = (std(level, lower) for std in (sampler.fixed_small, sampler.fixed_large))
    assert np.allclose(noise("ddim(eta=0.3)")[:-1], 0.3 * small)
    assert np.allclose(noise("ddpm(variance=fixed_large)")[:-1], large)
    assert np.allclose(noise("ddpm(variance=fixed_small)")[:-1], small)
    for text in ("dpm_solver_pp_2m(eta={})", "edm(s_churn={})"):
        amounts = [np.abs(noise(text.format(value))).max() for value in (0, 0.5, 1)]
        assert amounts[0] == 0 < amounts[1] < amounts[2]


@observes("sample --num", "sample --batch", "sample --seed", "sample --condition")
def test_samples(run, tmp_path):
    """So many samples start from the noise of the seed and their index, in such batches."""
    starts, run_plan = [], sampler.sample_switching

    def spy(programs, index, plan, x, keys, *rest):
        starts.append((plan, np.asarray(x), keys))
        return run_plan(programs, index, plan, x, keys, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.sampler, "sample_switching", spy)
        x = sampled(run, "--seed 11 --batch 8 --condition 3,1,4", num=12)
    keys = sampler.image_keys(jax.random.key(11), np.arange(16))
    noise = sampler.noise(keys, SHAPE)
    assert [len(start) for _, start, _ in starts] == [8, 8]
    assert np.allclose(np.concatenate([start for _, start, _ in starts]), noise)
    key_data = [jax.random.key_data(keys) for _, _, keys in starts]
    assert (np.concatenate(key_data) == jax.random.key_data(keys)).all()
    assert all(is_same(plan, ddim(schedule.trailing(LEVELS, 2))) for plan, _, _ in starts)
    assert np.allclose(x, table_of(0.5)[np.resize([3, 1, 4], 12)])


def guided(scale, away_from=-1, value=0.5):
    """The guided estimate of each class in turn."""
    table = table_of(0.5)
    from_row = table_of(value)[away_from] if value == 0.5 else table_of(value)[:10]
    return from_row + scale * (table[:10] - from_row)


def rescaled(x, share):
    std, to = (np.std(each, (1, 2, 3), keepdims=True) for each in (x, table_of(0.5)[:10]))
    return x * (1 - share + share * to / std)


@observes(
    "sample --guidance",
    "sample --guidance-rescale",
    "sample --negative",
    "sample --autoguide-with",
    "sample --autoguide-checkpoint",
)
def test_guidance(run, other_run):
    """The estimate is led away from what is named, as far as is asked."""
    auto = f"--guidance 3 --autoguide-with {other_run}"
    cases = {
        "--guidance 0": guided(0),
        "--guidance 2.5": guided(2.5),
        "--guidance 2.5 --guidance-rescale 0.7": rescaled(guided(2.5), 0.7),
        "--guidance 3 --negative 4": guided(3, 4),
        auto: guided(3, value=0.95),
        f"{auto} --autoguide-checkpoint 2": guided(3, value=0.8),
    }
    for words, expected in cases.items():
        assert np.allclose(sampled(run, words, "--no-clip"), expected, atol=1e-5), words


@observes("sample --guidance-interval", "sample --two-passes")
def test_guided_rows(run):
    """Guidance is in the rows of the interval, by one evaluation or by two."""
    t = schedule.trailing(LEVELS, 2)
    level = schedule.at(LEVELS, t)
    noisy, last = (level.sigma / level.alpha).tolist()
    plain, twice = table_of(0.5)[:10], guided(2)
    at_last, at_first = f"{last / 2} {2 * last}", f"{2 * last} {2 * noisy}"
    words = "--guidance 2 --no-clip --guidance-interval"
    assert np.allclose(sampled(run, words, at_last), twice, atol=1e-5)
    assert np.allclose(sampled(run, words, at_first), plain, atol=1e-5)
    networks = []
    for option in ("", "--two-passes"):
        traced, guide = [], pipeline.classifier_free_guidance

        def spy(denoise, *args, traced=traced, guide=guide):
            def counted(x, level, condition):
                traced.append(len(x))
                return denoise(x, level, condition)

            return guide(counted, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "classifier_free_guidance", spy)
            sampled(run, "--guidance 2", option, num=16)
        networks.append(set(traced))
    # One trace counts evaluations of the batch of 16, the other is of a device's two samples.
    assert networks == [{32, 4}, {16, 2}]


@observes("sample --guidance-channels")
def test_guided_channels(run, monkeypatch):
    """The number is that of the guidance that is compiled; x of the probe has one channel."""
    given, guide = [], pipeline.classifier_free_guidance
    monkeypatch.setattr(
        pipeline,
        "classifier_free_guidance",
        lambda *args: (given.append(args[-1]), guide(*args))[1],
    )
    for words, channels in (("", None), ("--guidance-channels 1", 1)):
        given.clear()
        x = sampled(run, "--guidance 2 --no-clip", words)
        assert set(given) == {channels}
        assert np.allclose(x, guided(2), atol=1e-5)


@observes("sample --clip", "sample --threshold")
def test_bound(run):
    """The estimate is clipped to the range of images, thresholded, or neither."""
    x = guided(4)
    size = np.maximum(np.quantile(np.abs(x).reshape(10, -1), 0.8, axis=1), 1).reshape(-1, 1, 1, 1)
    assert size.max() > 1.1
    cases = {
        "--clip": np.clip(x, -1, 1),
        "--no-clip": x,
        "--threshold 0.8": np.clip(x, -size, size) / size,
    }
    for words, expected in cases.items():
        assert np.allclose(sampled(run, "--guidance 4", words), expected, atol=1e-5), words


@observes("sample --out", "sample --save", "sample --animate", "sample --save-plan")
def test_files(run, tmp_path):
    """Each file is where it is named, and has what it should."""
    paths = {name: tmp_path / f"{name}{end}" for name, end in FILES.items()}
    words = [word for name, path in paths.items() for word in (f"--{name}", path)]
    # Guided in the first of two rows: the frames differ.
    words += ["--guidance 2 --guidance-interval 2 1000"]
    images = image_io.to_uint8(sampled(run, *words, num=11))
    saved = np.load(paths["save"])
    assert (saved["images"] == images).all()
    assert (saved["labels"] == np.arange(11) % 10).all()
    picture = image_io.grid(images, [str(i % 10) for i in range(11)])
    assert (np.asarray(Image.open(paths["out"])) == np.asarray(picture)).all()
    with Image.open(paths["animate"]) as animation:
        assert (animation.n_frames, animation.size) == (2, picture.size)
        animation.seek(1)
        last = np.asarray(animation.convert("RGB"), int)
    assert np.abs(last - np.asarray(picture)).max() <= 2
    assert json.loads(paths["save-plan"].read_text())["t"] == [20, 10]
    assert sorted(tmp_path.iterdir()) == sorted(paths.values())


@observes("sample --out-dir", "sample --overwrite")
def test_single_images(run, tmp_path):
    """Each image has a file, which another one replaces only if that is asked for."""
    folder = tmp_path / "images"
    for seed, option in ((3, ""), (3, "--overwrite")):
        images = image_io.to_uint8(sampled(run, f"--seed {seed} --out-dir {folder}", option))
        files = sorted(folder.iterdir())
        assert len(files) == len(images) == 10
        for path, image in zip(files, images, strict=True):
            assert (np.asarray(Image.open(path)) == image[..., 0]).all()
            path.write_text("another")
    with pytest.raises(SystemExit):
        sampled(run, "--seed 3 --out-dir", folder)
    assert {path.read_text() for path in folder.iterdir()} == {"another"}


FILES = {"out": ".png", "save": ".npz", "animate": ".gif", "save-plan": ".json"}


@observes("sample --preview")
def test_preview(run, tmp_path):
    """The picture is written during sampling, where that is asked for."""
    out = tmp_path / "out.png"
    for option, count in (("", 1), ("--preview", 2)):
        found = calls((image_io, "save_png"), "sample", run, "--num 8 --steps 1 --out", out, option)
        assert [args[0] for args, _ in found] == [out] * count
