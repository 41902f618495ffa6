import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffjax import schedule
from diffjax.testing import schedules


@given(schedules())
def test_every_schedule_goes_from_data_to_noise(levels):
    assert (levels.t[0], levels.alpha[0], levels.sigma[0]) == (0, 1, 0)
    assert all(leaf.dtype == np.float64 for leaf in levels[1:])
    assert (np.diff(schedule.logsnr(levels)) < 0).all()
    np.testing.assert_allclose(levels.alpha**2 + levels.sigma**2, 1, rtol=0, atol=1e-15)


def test_linear_keeps_all_digits_near_the_data():
    """Against exact rational arithmetic: 1 - alpha**2, formed in floats, loses four digits at t = 1."""
    levels = schedule.linear(1000)
    betas = [Fraction(float(beta)) for beta in np.linspace(1e-4, 0.02, 1000)]
    abar = Fraction(1)
    for t, beta in enumerate(betas[:20], start=1):
        abar *= 1 - beta
        assert levels.sigma[t] ** 2 == pytest.approx(float(1 - abar), rel=1e-14, abs=0)
        assert levels.alpha[t] ** 2 == pytest.approx(float(abar), rel=1e-14, abs=0)


def test_published_end_points():
    """alpha-bar_T of the two schedules at T = 1000: DDPM's 4.04e-5, and improved DDPM's 2.4e-9."""
    assert schedule.linear().alpha[-1] ** 2 == pytest.approx(4.04e-5, rel=1e-2)
    assert schedule.cosine().alpha[-1] ** 2 == pytest.approx(2.4e-9, rel=2e-2)


@given(st.integers(3, 400))
def test_cosine_is_its_formula_where_no_beta_is_cut(T):
    t = np.arange(T + 1) / T
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    uncut = np.concatenate([[True], np.cumprod(1 - f[1:] / f[:-1] < 0.999).astype(bool)])
    np.testing.assert_allclose(schedule.cosine(T).alpha[uncut] ** 2, (f / f[0])[uncut], rtol=1e-10)


@given(schedules(), st.data())
def test_respacing_is_indexing(levels, data):
    t = data.draw(st.lists(st.integers(0, schedule.length(levels)), min_size=1))
    picked = schedule.at(levels, t)
    assert [list(leaf) for leaf in picked] == [[whole[i] for i in t] for whole in levels]


@pytest.mark.parametrize("name", schedule.SPACINGS)
@pytest.mark.parametrize("T", [1, 2, 7, 100, 1000])
def test_every_spacing_gives_n_distinct_levels_for_every_n(name, T):
    levels = schedule.linear(T, 1e-4, 2e-4)
    most = 1 + int(0.8 * T) if name == "quadratic" else T
    for steps in range(1, most + 1):
        t = schedule.SPACINGS[name](levels, steps)
        assert t.shape == (steps,)
        assert (schedule.check_levels(levels, t) == t).all()
        if name in ("trailing", "linspace"):
            assert t[0] == T
        if name in ("leading", "linspace", "quadratic") and steps > 1:
            assert t[-1] == 1


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50, 100, 1000])
def test_spacings_are_those_of_the_papers(steps):
    """Where the steps divide T, trailing and leading are multiples of the stride (arXiv:2305.08891, table 2)."""
    levels, stride = schedule.linear(1000), 1000 // steps
    assert list(schedule.trailing(levels, steps)) == list(range(1000, 0, -stride))
    assert list(schedule.leading(levels, steps)) == [1 + stride * i for i in reversed(range(steps))]


def test_quadratic_integers_of_the_ddim_paper():
    """int(x) of linspace(0, sqrt(800), 10)**2, counted from 0 in the paper's code and from 1 here."""
    expected = [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    assert list(schedule.quadratic(schedule.linear(1000), 10)) == [1 + t for t in reversed(expected)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: schedule.from_betas([0.1, 1.0]), "beta_2 is 1.0"),
        (lambda s: schedule.from_betas([0.0]), "beta_1 is 0.0"),
        (lambda s: schedule.from_betas([0.1, np.nan]), "beta_2 is nan"),
        (lambda s: schedule.from_betas([]), "at least one"),
        (lambda s: schedule.linear(0), "at least one noisy level, got T = 0"),
        (lambda s: schedule.trailing(s, 0), "steps is 0: this schedule takes 1 to 100"),
        (lambda s: schedule.linspace(s, 101), "steps is 101"),
        (lambda s: schedule.quadratic(s, 82), "room for 81 of 100 levels, not for 82 steps"),
        (lambda s: schedule.at(s, 101), "level 101 is not on the schedule: use 0..100"),
        (lambda s: schedule.at(s, -1), "level -1 is not on the schedule"),
        (lambda s: schedule.at(s, 1.5), "counted in integers"),
        (lambda s: schedule.check_levels(s, [5, 5, 1]), "got 5 before 5"),
        (lambda s: schedule.check_levels(s, [1, 0]), "level 0 is data"),
        (lambda s: schedule.check_levels(s, []), "at least one level"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(schedule.linear(100))
