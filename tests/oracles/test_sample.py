"""`diffjax sample` of an oracle: every image is known to a grey value, whatever is asked for."""

import numpy as np
import pytest

from diffjax import sampler, schedule, solvers
from diffjax.cli import main
from tests.oracles.oracle import (
    MEANS,
    NULL,
    SHIFT,
    SPREAD,
    Known,
    OracleConfig,
    configuration,
    grey,
    samples,
    write_run,
)

LEVELS = OracleConfig().levels
NUM = 16
TURNS = np.arange(NUM) % 2  # conditions 0,1 in turn
ONES = np.zeros(NUM, int)  # condition 0


def sample(run, tmp_path, *words, num=NUM):
    """The images of a command, as grey values [N, 4, 4, 1]."""
    out = tmp_path / "samples.npz"
    options = ["--num", str(num), "--out", str(tmp_path / "grid.png"), "--save", str(out)]
    if not any(word.startswith("--sampler") for word in words):
        options += ["--sampler", "ddim:10"]
    main(["sample", str(run), *words, *options])
    return np.load(out)["images"].astype(float)


GUIDED = Known(ONES, scale=3.0, bound=None)
AWAY = Known(ONES, scale=2.0, away=1, bound=None)
# Guided so strongly at the first levels that the bound of the estimates tells in the end.
STRONG = Known(ONES, scale=6.0, away=1, interval=(0.5, 900.0))
STRONGLY = "--condition 0 --negative 1 --guidance 6 --guidance-interval 0.5 900"
# Options, what they ask for, and what would be sampled if the last one of them were ignored.
CASES = {
    "--seed 7": (Known(TURNS, seed=7), Known(TURNS)),
    "--weights raw": (Known(TURNS), None),
    "--batch 8": (Known(TURNS), None),
    "--condition 0 --guidance 0": (Known(ONES, scale=0.0), Known(ONES)),
    "--condition 0 --no-clip --guidance 3": (GUIDED, GUIDED._replace(scale=1.0)),
    f"{STRONGLY} --no-clip": (STRONG._replace(bound=None), STRONG),
    STRONGLY: (STRONG, STRONG._replace(bound=None)),
    "--condition 0 --negative 1 --guidance 4 --threshold 0.6": (
        AWAY._replace(scale=4.0, bound=0.6),
        AWAY._replace(scale=4.0, bound=1.0),
    ),
    "--condition 0 --no-clip --guidance 2 --negative 1": (AWAY, AWAY._replace(away=NULL)),
    "--condition 0 --no-clip --guidance 2 --negative 1 --two-passes": (AWAY, None),
    "--condition 0 --no-clip --guidance 2 --negative 1 --guidance-rescale 0.7": (
        AWAY._replace(rescale=0.7),
        AWAY,
    ),
    "--condition 0 --no-clip --guidance 2 --negative 1 --guidance-interval 0.5 1": (
        AWAY._replace(interval=(0.5, 1.0)),
        AWAY._replace(interval=(0.5, np.inf)),
    ),
    "--condition 0 --no-clip --guidance 2 --autoguide-with {worse}": (
        Known(ONES, scale=2.0, away=None, lean_away=0.2, bound=None),
        Known(ONES),
    ),
}


@pytest.mark.parametrize("words", CASES)
def test_options_arrive(words, run, worse_run, tmp_path):
    """DDIM in ten steps, by the papers' lines in float64; each option makes a difference."""
    known, ignored = CASES[words]
    plan = sampler.ddim(LEVELS, schedule.trailing(LEVELS, 10))
    lean = 0.4 if "raw" in words else 0.0
    expected = grey(samples(plan, known, lean))
    if ignored is not None:
        assert np.abs(expected - grey(samples(plan, ignored))).max() > 2
    found = sample(run, tmp_path, *words.format(worse=worse_run).split())
    np.testing.assert_allclose(found, expected, atol=0.6)


PLANS = {
    "ddim(eta=0.7):10": lambda: sampler.ddim(LEVELS, schedule.trailing(LEVELS, 10), 0.7),
    "dpm_solver_pp_2m(spacing=karras):10": lambda: solvers.dpm_solver_pp_2m(
        LEVELS, schedule.karras(LEVELS, 10)
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_samplers_arrive(name, run, tmp_path):
    plain = sampler.ddim(LEVELS, schedule.trailing(LEVELS, 10))
    expected = grey(samples(PLANS[name](), Known(TURNS, seed=3)))
    assert np.abs(expected - grey(samples(plain, Known(TURNS, seed=3)))).max() > 3
    found = sample(run, tmp_path, "--sampler", name, "--seed", "3")
    np.testing.assert_allclose(found, expected, atol=0.6)


FLOW, EDM = OracleConfig(predicts="flow"), OracleConfig(predicts="edm")
STRAIGHT = schedule.flow(100, SHIFT)  # the same path as FLOW.levels, and so the same images
EXPLODING = schedule.edm(100)
OTHERS = {
    "ddim:10": (FLOW, lambda: sampler.ddim(STRAIGHT, schedule.trailing(STRAIGHT, 10))),
    "dpm_solver_pp_2m:10": (
        FLOW, lambda: solvers.dpm_solver_pp_2m(STRAIGHT, schedule.trailing(STRAIGHT, 10))
    ),
    "heun:6": (FLOW, lambda: solvers.heun(STRAIGHT, schedule.trailing(STRAIGHT, 6))),
    "ddpm(variance=fixed_large):10": (
        FLOW, lambda: sampler.sigma_hat(FLOW.levels, schedule.trailing(STRAIGHT, 10))
    ),
    "heun(spacing=karras):6": (EDM, lambda: solvers.heun(EXPLODING, schedule.karras(EXPLODING, 6))),
    "ddim(eta=0.7):10": (
        EDM, lambda: sampler.ddim(EXPLODING, schedule.trailing(EXPLODING, 10), 0.7)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_parameterizations(name, images, tmp_path):
    """Networks of flow matching and of EDM, by plans on their own paths."""
    network, plan = OTHERS[name]
    run = write_run(tmp_path / "run", configuration(images, network))
    expected = grey(samples(plan(), Known(TURNS, seed=3)))
    assert np.abs(expected - 127.5).max() > 40  # neither grey, nor noise
    found = sample(run, tmp_path, "--sampler", name, "--seed", "3")
    np.testing.assert_allclose(found, expected, atol=0.6)


# The programs sample what these lines do; that it is what users ask for can be seen on these.


def test_distribution():
    """Samples have the mean of their class, and its spread but for the noise of level 1, which the
    last estimate takes away."""
    plan = solvers.dpm_solver_pp_2m(LEVELS, schedule.uniform_logsnr(LEVELS, 50))
    images = samples(plan, Known(np.arange(512) % 2))
    spread = SPREAD / (1 + (LEVELS.sigma[1] / LEVELS.alpha[1] / SPREAD) ** 2) ** 0.5
    for label, mean in enumerate(MEANS):
        of_class = images[label::2]
        np.testing.assert_allclose(of_class.mean(0), mean, atol=0.03)
        np.testing.assert_allclose(of_class.std(0).mean(), spread, rtol=0.05)


def test_directions():
    """Guidance leads from the null towards the condition, from the negative one, and from the
    worse model; rescaling brings the contrast back."""
    plan = sampler.ddim(LEVELS, schedule.trailing(LEVELS, 10))
    towards = (MEANS[0] - MEANS[1]) / np.linalg.norm(MEANS[0] - MEANS[1])

    def along(known):
        images = samples(plan, known)
        return np.sum(images * towards, (1, 2, 3)).mean(), images.mean(), images.std((1, 2, 3))

    plain, guided, away = along(Known(ONES)), along(GUIDED), along(AWAY)
    autoguided = along(Known(ONES, scale=2.0, away=None, lean_away=0.2, bound=None))
    assert guided[0] > plain[0] + 0.03
    assert away[0] > plain[0] + 0.3
    assert autoguided[1] < plain[1] - 0.1  # the worse model leans to the bright side
    assert (along(AWAY._replace(rescale=0.7))[2] < away[2]).all()
