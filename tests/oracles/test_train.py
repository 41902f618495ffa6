"""`diffjax train` and `diffjax distill` of oracles: losses are known, and what students learn."""

import json

import numpy as np
import pytest

from diffjax import build, loss, sampler, schedule
from diffjax.cli import main
from diffjax.data.batches import first_batches
from diffjax.inference.model import load_model
from diffjax.process import append_dims
from diffjax.training.state import step_key
from tests.oracles.oracle import (
    MEANS,
    SPREAD,
    Known,
    OracleConfig,
    configuration,
    estimate,
    grey,
    samples,
    write_images,
    write_run,
)

STEPS = 6
OWN = """
from tests.oracles.oracle import configuration

config = configuration({path!r}, steps={steps}, learning_rate=0.05, ema=(0.9,), log_every=1,
    eval_every={steps}, preview_every=0, save_every={steps})
"""


def lines_of(run, name):
    """The values of a metric by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def simple_loss(info, split, params):
    """The mean of |eps - output|**2 over the first batch of a split, by the draws of step 0."""
    levels = info.config.network.levels
    (batch,) = first_batches(split, 16, 8, 1, conditioning=info.conditioning)
    table = (schedule.at(levels, np.arange(1, len(levels.t))),)
    noisy = loss.add_noise_to_batch(batch, step_key(0, 0), loss.uniform, table)
    level = noisy.row[0]
    alpha, sigma = (np.asarray(leaf, np.float64) for leaf in level[1:])
    x_t, eps = (np.asarray(leaf, np.float64) for leaf in (noisy.x_t, noisy.eps))
    x0 = estimate(x_t, alpha, sigma, batch["condition"], float(params["lean"]))
    x0 += float(params["reach"]) * x_t
    output = (x_t - append_dims(alpha, x_t) * x0) / append_dims(sigma, x_t)
    return np.mean((eps - output) ** 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose lean goes from 0 to -0.1 at most, of images that lean to -0.3; held-out ones
    are not those that it is trained on."""
    folder = tmp_path_factory.mktemp("train")
    data = write_images(folder / "two.npz", 240, SPREAD, means=MEANS - 0.3)
    (folder / "own.py").write_text(OWN.format(path=str(data), steps=STEPS))
    main(["train", str(folder / "own.py"), "--workdir", str(folder / "run")])
    return folder / "run"


def test_held_out_loss(trained):
    """It is that of the moving average, on held-out images, with no condition dropped."""
    average, raw = (load_model(trained, weights=weights) for weights in ("ema", "raw"))
    dataset = build.load_data(average.info.config)
    found = lines_of(trained, "held_out_loss")[STEPS]
    expected = simple_loss(average.info, dataset.held_out, average.params)
    assert found == pytest.approx(expected, rel=2e-3)
    # Neither that of the parameters, nor on images of the training.
    for other in (
        simple_loss(average.info, dataset.held_out, raw.params),
        simple_loss(average.info, dataset.train, average.params),
    ):
        assert abs(other / expected - 1) > 0.01


def test_training_leans_to_the_data(trained):
    """A parameter goes the way that lowers the loss, and its moving average follows."""
    average, raw = (
        float(load_model(trained, weights=weights).params["lean"]) for weights in ("ema", "raw")
    )
    assert raw < average < 0


@pytest.mark.parametrize("predicts", ["x0", "flow"])
def test_student_of_one_step(predicts, tmp_path):
    """Its loss is known before it learns; after it, its one step ends where two of its teacher's
    do."""
    spread = 0.5
    data = write_images(tmp_path / "two.npz", 240, spread)
    teacher = OracleConfig(predicts=predicts, spread=spread)
    run = write_run(tmp_path / "teacher", configuration(data, teacher))
    words = "--start 2 --end 1 --train.steps 30 --train.batch 64 --train.warmup 1 --train.ema 0.5"
    words += " --train.decay none --train.learning-rate 0.01 --train.log-every 1"
    words += " --train.eval-every 0 --train.preview-every 0 --train.save-every 60"
    main(["distill", str(run), "--workdir", str(tmp_path / "students"), *words.split()])
    student, levels = tmp_path / "students" / "1", teacher.levels
    known = Known(np.arange(64) % 2, bound=None)
    one, two = (
        samples(sampler.ddim(levels, schedule.trailing(levels, steps)), known, spread=spread)
        for steps in (1, 2)
    )
    losses, first = lines_of(student, "loss"), np.mean((two - one) ** 2)
    assert losses[1] == pytest.approx(first, rel=0.2)
    assert losses[60] < 0.05 * first
    out = tmp_path / "samples.npz"
    options = ["--num", "64", "--no-clip", "--out", str(tmp_path / "a.png"), "--save", str(out)]
    main(["sample", str(student), *options])
    found = np.load(out)["images"].astype(float)
    assert np.abs(grey(two) - grey(one)).max() > 20
    np.testing.assert_allclose(found, grey(two), atol=4)
