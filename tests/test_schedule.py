from fractions import Fraction

import numpy as np
import pytest
from helpers import naming
from hypothesis import given
from hypothesis import strategies as st

from diffjax import schedule
from diffjax.testing import assert_schedule, schedules


@given(schedules(exploding=True, terminal=True, flow=True))
def test_data_to_noise(levels):
    assert_schedule(levels)


@given(schedules(terminal=True))
def test_variance_preserving(levels):
    np.testing.assert_allclose(levels.alpha**2 + levels.sigma**2, 1, rtol=0, atol=1e-13)
    schedule.check_variance_preserving(levels, "this test")


def test_linear_near_the_data():
    """Against exact rational arithmetic: 1 - alpha**2, formed in floats, loses four digits at t =
    1."""
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
def test_cosine(T):
    """It is its formula where no beta is cut."""
    t = np.arange(T + 1) / T
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    uncut = np.concatenate([[True], np.cumprod(1 - f[1:] / f[:-1] < 0.999).astype(bool)])
    assert uncut.sum() == T  # all but the last
    np.testing.assert_allclose(schedule.cosine(T).alpha[uncut] ** 2, (f / f[0])[uncut], rtol=1e-10)


@given(st.integers(100, 4000))
def test_rescaled_linear(T):
    """log alpha-bar_T is -sum(betas) = -10.05, and less by half their squares, 67/T."""
    assert np.log(schedule.rescaled_linear(T).alpha[-1] ** 2) == pytest.approx(
        -10.05 - 67 / T, abs=12 / T
    )


def test_scaled_linear():
    """The roots of its betas are linear."""
    levels = schedule.scaled_linear()
    betas = 1 - levels.alpha[1:] ** 2 / levels.alpha[:-1] ** 2
    np.testing.assert_allclose(
        np.diff(np.sqrt(betas)), (0.012**0.5 - 0.00085**0.5) / 999, rtol=1e-8
    )
    assert betas[[0, -1]] == pytest.approx([0.00085, 0.012], rel=1e-9)
    assert levels.alpha[-1] ** 2 == pytest.approx(0.00466, rel=1e-2)  # that of latent diffusion


@given(st.floats(-5, 0), st.floats(1, 5), st.floats(0.3, 2))
def test_sigmoid(start, end, temperature):
    """It is its formula where no beta is cut."""

    def f(u):
        return 1 / (1 + np.exp(-(start + u * (end - start)) / temperature))

    u = np.arange(301) / 300
    gamma = (f(1) - f(u)) / (f(1) - f(0))
    uncut = np.concatenate([[True], np.cumprod(1 - gamma[1:] / gamma[:-1] < 0.999).astype(bool)])
    found = schedule.sigmoid(300, start, end, temperature).alpha ** 2
    np.testing.assert_allclose(found[uncut], gamma[uncut], rtol=1e-9)
    assert uncut.sum() == 300  # all but the last, where nothing is left


@given(st.floats(0.1, 12), st.floats(0.1, 12), st.integers(1, 100))
def test_from_logsnr(top, fall, T):
    levels = schedule.from_logsnr(lambda u: top - fall * u**2, T)
    u = np.arange(1, T + 1) / T
    np.testing.assert_allclose(schedule.logsnr(levels)[1:], top - fall * u**2, atol=1e-10)


def test_edm_equation_5():
    levels = schedule.edm(18)
    i = np.arange(18)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(levels.sigma[:0:-1], sigma, rtol=1e-12)
    assert (levels.alpha == 1).all()


@given(schedules().filter(lambda levels: schedule.length(levels) > 1))
def test_zero_terminal_snr(levels):
    """Algorithm 1 of its paper, and no signal at level T."""
    rescaled = schedule.zero_terminal_snr(levels)
    alpha = levels.alpha[1:]
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    # As printed, a difference of numbers near 1.
    np.testing.assert_allclose(rescaled.alpha[1:], expected, atol=1e-14 / (alpha[0] - alpha[-1]))
    assert rescaled.alpha[-1] == 0
    assert rescaled.sigma[-1] == pytest.approx(1, abs=1e-13)
    assert (rescaled.alpha[1], rescaled.sigma[1]) == pytest.approx(
        (levels.alpha[1], levels.sigma[1]), rel=1e-13, abs=0
    )


@given(schedules())
def test_from_alphas(levels):
    """The alphas of a schedule give it back."""
    found = schedule.from_alphas(levels.alpha[1:])
    np.testing.assert_allclose(found.alpha, levels.alpha, rtol=0)
    # 1 - alpha is rounded where alpha is near 1.
    np.testing.assert_allclose(found.sigma**2, levels.sigma**2, rtol=1e-12, atol=1e-15)
    both = schedule.from_alphas(levels.alpha[1:], levels.sigma[1:])
    assert all(np.array_equal(a, b) for a, b in zip(both, levels, strict=True))


@given(schedules())
def test_forms_of_a_path(levels):
    """The variance-preserving and the exploding form have the same logsnr."""
    levels = schedule.level_at(levels, slice(31))
    exploding = schedule.variance_exploding(levels)
    np.testing.assert_allclose(
        schedule.logsnr(exploding), schedule.logsnr(levels), rtol=1e-12, atol=1e-12
    )
    back = schedule.variance_preserving(exploding)
    for found, leaf in zip(back, levels, strict=True):
        np.testing.assert_allclose(found, leaf, rtol=1e-12)


def test_one_level():
    """One level alone is the noisiest."""
    assert schedule.edm(1).sigma[1] == 80
    assert schedule.linear(1).alpha[1] ** 2 == pytest.approx(1 - 0.02)


@given(st.integers(1, 300), st.floats(0.1, 10), st.floats(0.1, 10))
def test_flow(T, shift, other):
    """Straight from data to noise; shifts multiply sigma/alpha, one after the other too, and 1 is
    none."""
    s = np.arange(T + 1) / T
    plain, levels = schedule.flow(T), schedule.flow(T, shift)
    np.testing.assert_allclose(plain.sigma, s, rtol=1e-15)
    np.testing.assert_allclose(levels.sigma, shift * s / (1 + (shift - 1) * s), rtol=1e-12)
    np.testing.assert_allclose(levels.alpha + levels.sigma, 1, rtol=1e-12)
    assert (levels.alpha[-1], levels.sigma[-1]) == (0, 1)
    twice = other * levels.sigma / (1 + (other - 1) * levels.sigma)
    np.testing.assert_allclose(schedule.flow(T, shift * other).sigma, twice, rtol=1e-9)
    inner = slice(1, -1)
    ratio = (levels.sigma[inner] / levels.alpha[inner]) / (s[inner] / (1 - s[inner]))
    np.testing.assert_allclose(ratio, shift, rtol=1e-9)


def test_more_shift_is_more_noise():
    for less, more in ((0.5, 1.0), (1.0, 3.0)):
        assert (schedule.flow(50, more).sigma > schedule.flow(50, less).sigma)[1:-1].all()


@given(schedules(exploding=True, flow=True).filter(lambda s: schedule.length(s) > 2), st.data())
def test_levels_between_of_every_form(levels, data):
    """A rescaled path has the rescaled levels, between those of the table too."""
    t = data.draw(st.floats(1, schedule.length(levels) - 1))
    found = schedule.variance_preserving(schedule.at(levels, t))
    expected = schedule.at(schedule.variance_preserving(levels), t)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------------------- levels


def test_level_at():
    """One row for an index, several for a slice, a mask or an array of indices."""
    levels = schedule.linear(5)
    assert schedule.level_at(levels, 2) == tuple(leaf[2] for leaf in levels)
    for i in (slice(1, 4), levels.sigma > 0.1, [3, 0, 3]):
        for leaf, expected in zip(schedule.level_at(levels, i), levels, strict=True):
            np.testing.assert_array_equal(leaf, expected[i])


def test_unsigned_levels():
    t = np.array([90, 50, 1], np.uint8)
    assert list(schedule.check_levels(schedule.linear(100), t)) == [90, 50, 1]


@given(schedules(exploding=True, terminal=True, flow=True), st.data())
def test_respacing_is_indexing(levels, data):
    t = data.draw(st.lists(st.integers(0, schedule.length(levels)), min_size=1))
    for given_t in (t, [float(i) for i in t]):
        picked = schedule.at(levels, given_t)
        assert [list(leaf) for leaf in picked] == [[whole[i] for i in t] for whole in levels]


@given(schedules(exploding=True).filter(lambda levels: schedule.length(levels) > 1), st.data())
def test_fractional_levels(levels, data):
    """Between two levels logsnr is a straight line."""
    i = data.draw(st.integers(1, schedule.length(levels) - 1))
    f = data.draw(st.floats(0.01, 0.99))
    level = schedule.at(levels, i + f)
    ends = schedule.logsnr(levels)[i : i + 2]
    assert schedule.logsnr(level) == pytest.approx(
        ends[0] + f * (ends[1] - ends[0]), rel=1e-9, abs=1e-9
    )
    total = (levels.alpha**2 + levels.sigma**2)[i : i + 2]
    if schedule.is_variance_preserving(levels):
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12)
    else:
        assert min(total) * (1 - 1e-9) <= level.alpha**2 + level.sigma**2 <= max(total) * (1 + 1e-9)
    assert schedule.t_of_logsnr(levels, schedule.logsnr(level)) == pytest.approx(i + f, abs=1e-6)


# ----------------------------------------------------------------------------- spacings


@pytest.mark.parametrize("name", schedule.SPACINGS)
@pytest.mark.parametrize("T", [1, 2, 7, 100, 1000])
def test_spacings(name, T):
    """Every spacing gives n distinct levels for every n."""
    levels = schedule.linear(T, 1e-4, 2e-4)
    most = 1 + int(0.8 * T) if name == "quadratic" else T
    for steps in range(1, most + 1):
        t = schedule.SPACINGS[name](levels, steps)
        assert t.shape == (steps,)
        assert (schedule.check_levels(levels, t) == t).all()
        if name in ("trailing", "linspace", "karras", "uniform_logsnr"):
            assert t[0] == T
        if name in ("leading", "linspace", "quadratic", "karras", "uniform_logsnr") and steps > 1:
            assert t[-1] == 1


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 50, 100, 1000])
def test_trailing_and_leading(steps):
    """Where the steps divide T, trailing and leading are multiples of the stride
    (arXiv:2305.08891, table 2)."""
    levels, stride = schedule.linear(1000), 1000 // steps
    assert list(schedule.trailing(levels, steps)) == list(range(1000, 0, -stride))
    assert list(schedule.leading(levels, steps)) == [1 + stride * i for i in reversed(range(steps))]


@pytest.mark.parametrize("T", [5, 10, 45, 125, 320, 605, 1000])
def test_quadratic_start(T):
    """0.8*T is a whole number for these, and the square of its root in float64 not always: 1 +
    0.8*T all the same."""
    levels = schedule.linear(T, 1e-4, 2e-4)
    for steps in range(2, int(0.8 * T) + 2):
        assert schedule.quadratic(levels, steps)[0] == 1 + 4 * T // 5


def test_quadratic_integers():
    """int(x) of linspace(0, sqrt(800), 10)**2, counted from 0 in the paper's code and from 1
    here."""
    expected = [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    assert list(schedule.quadratic(schedule.linear(1000), 10)) == [
        1 + t for t in reversed(expected)
    ]


@given(schedules(exploding=True), st.data(), st.floats(1, 9))
def test_even_spacings(levels, data, rho):
    """karras and uniform_logsnr are even in their own variable."""
    steps = data.draw(st.integers(1, schedule.length(levels)))
    for t, variable in (
        (schedule.karras(levels, steps, rho), lambda logsnr: np.exp(-logsnr / 2 / rho)),
        (schedule.uniform_logsnr(levels, steps), lambda logsnr: logsnr),
    ):
        distances = np.diff(
            variable(schedule.logsnr(schedule.at(levels, schedule.check_levels(levels, t))))
        )
        np.testing.assert_allclose(
            distances, distances.mean() if len(distances) else 0, rtol=1e-6, atol=1e-9
        )


def test_karras_on_edm():
    """18 levels of a finely tabulated schedule against equation 5."""
    t = schedule.karras(schedule.edm(1000), 18)
    sigma = (80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(schedule.at(schedule.edm(1000), t).sigma, sigma, rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: schedule.from_betas([0.1, 1.0]), "beta_2 1"),
        (lambda s: schedule.from_betas([0.0]), "beta_1 0"),
        (lambda s: schedule.from_betas([0.1, np.nan]), "beta_2 nan"),
        (lambda s: schedule.from_betas([]), "betas (0,)"),
        (lambda s: schedule.from_betas([0.5, 1e-17]), "logsnr 1 2"),
        (lambda s: schedule.from_betas([0.999] * 700), "alpha_216 0"),
        (lambda s: schedule.cosine(2.5), "T 2.5"),
        (lambda s: schedule.rescaled_linear(1), "beta_1 20"),
        (lambda s: schedule.trailing(s, 5.5), "steps 5.5"),
        (lambda s: schedule.linspace(s, "5"), "steps 5"),
        (lambda s: schedule.karras(s, 5, np.inf), "rho inf"),
        (
            lambda s: schedule.check_levels(schedule.level_at(s, slice(1, None)), [9, 3]),
            "schedule 0 alpha sigma",
        ),
        (lambda s: schedule.linear(0), "T 0"),
        (lambda s: schedule.trailing(s, 0), "steps 0 1 100"),
        (lambda s: schedule.linspace(s, 101), "steps 101"),
        (lambda s: schedule.quadratic(s, 82), "quadratic 81 100 82"),
        (lambda s: schedule.at(s, 101), "t 101 0 100"),
        (lambda s: schedule.at(s, -1), "t -1"),
        (lambda s: schedule.at(s, "two"), "t two 0 100"),
        (lambda s: schedule.at(s, np.nan), "t nan"),
        (lambda s: schedule.at(s, [2, 0.5]), "t 0.5 logsnr"),
        (lambda s: schedule.at(schedule.zero_terminal_snr(s), 99.5), "t 99.5 logsnr"),
        (lambda s: schedule.karras(schedule.zero_terminal_snr(s), 5), "schedule level 100 logsnr"),
        (
            lambda s: schedule.uniform_logsnr(schedule.zero_terminal_snr(s), 5),
            "schedule level 100 trailing",
        ),
        (lambda s: schedule.karras(s, 0), "steps 0"),
        (lambda s: schedule.karras(s, 5, -1.0), "rho -1"),
        (lambda s: schedule.from_alphas([0.9, np.nan]), "alpha_2 nan"),
        (lambda s: schedule.from_alphas([1.1]), "alpha_1 1.1 0 1"),
        (lambda s: schedule.from_alphas([0.9, 0.9]), "logsnr 1 2"),
        (lambda s: schedule.from_alphas([0.5, 0.0, 0.0]), "alpha_2 0"),
        (lambda s: schedule.from_alphas([0.9], [0.0]), "sigma_1 0"),
        (lambda s: schedule.from_alphas([0.9, 0.5], [0.1, np.inf]), "sigma_2 inf"),
        (lambda s: schedule.from_alphas([0.9, 0.8], [0.1]), "sigma (1,) alpha (2,)"),
        (lambda s: schedule.from_alphas([]), "alpha (0,)"),
        (
            lambda s: schedule.from_logsnr(lambda u: np.where(u < 1, -u, -np.inf), 5),
            "logsnr_5 -inf",
        ),
        (lambda s: schedule.from_logsnr(lambda u: u, 5), "logsnr 1 2"),
        (lambda s: schedule.sigmoid(10, 3.0, -3.0), "start 3 end -3"),
        (lambda s: schedule.edm(10, 80.0, 0.002), "smallest 80 largest 0.002"),
        (lambda s: schedule.rescaled_linear(20), "beta_20 1"),
        (lambda s: schedule.flow(10, 0.0), "shift 0"),
        (lambda s: schedule.flow(10, np.inf), "shift inf"),
        (lambda s: schedule.flow(0), "T 0"),
        (lambda s: schedule.at(schedule.flow(10), 9.5), "t 9.5 logsnr"),
        (lambda s: schedule.karras(schedule.flow(10), 5), "schedule level 10 trailing"),
        (
            lambda s: schedule.zero_terminal_snr(schedule.edm(10)),
            "schedule zero_terminal_snr alpha**2 + sigma**2 6401 10",
        ),
        (
            lambda s: schedule.zero_terminal_snr(schedule.from_betas([0.5])),
            "schedule T 1 zero_terminal_snr",
        ),
        (
            lambda s: schedule.check_variance_preserving(
                s._replace(alpha=s.alpha * 1.00001), "this_test"
            ),
            "this_test alpha**2 + sigma**2 1.00002",
        ),
        (lambda s: schedule.variance_exploding(schedule.zero_terminal_snr(s)), "level alpha 0"),
        (lambda s: schedule.check_levels(s, [5, 5, 1]), "t 5"),
        (lambda s: schedule.check_levels(s, [1, 0]), "t 0"),
        (lambda s: schedule.check_levels(s, []), "t (0,)"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=naming(*words.split())):
        make(schedule.linear(100))
