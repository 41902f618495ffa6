"""Configurations of diffusers' schedulers: which are DDPM's process, and what is said of them."""

import json
import re

import numpy as np
import pytest
from helpers import naming

from diffjax import schedule
from diffjax.build import build_schedule
from diffjax.config import Config
from diffjax.interop.schedulers import read_diffusion, scheduler_config, scheduler_notes

DDPM = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
}


def read(path, **fields):
    path.write_text(json.dumps(DDPM | fields))
    return read_diffusion(json.loads(path.read_text()), path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scheduler_config.json"


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "EulerDiscreteScheduler", "sigma_max": None, "timestep_type": "discrete"},
        {"_class_name": "UniPCMultistepScheduler", "sigma_max": None, "use_flow_sigmas": False},
        {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"},
        {"trained_betas": np.linspace(0.0001, 0.02, 1000, dtype=np.float32).tolist()},
        {"beta_schedule": "sigmoid", "trained_betas": np.linspace(0.0001, 0.02, 1000).tolist()},
    ],
)
def test_the_process_of_ddpm(path, fields):
    """Samplers of one process have one schedule; trained betas stand before beta_schedule."""
    read_schedule = build_schedule(Config(diffusion=read(path, **fields)))
    np.testing.assert_allclose(read_schedule.alpha, schedule.linear(1000).alpha, rtol=1e-5)


@pytest.mark.parametrize("name", ["scaled_linear", "cosine"])
def test_trained_betas_of_known_schedules(path, name):
    levels = {"scaled_linear": schedule.scaled_linear, "cosine": schedule.cosine}[name](500)
    betas = 1 - (levels.alpha[1:] / levels.alpha[:-1]) ** 2
    betas = betas.astype(np.float32).astype(float).tolist()
    found = read(path, trained_betas=betas, num_train_timesteps=500)
    assert found.schedule == name
    read_schedule = build_schedule(Config(diffusion=found))
    np.testing.assert_allclose(read_schedule.alpha, levels.alpha, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "prediction"),
    [
        ({"prediction_type": "v_prediction"}, "v"),
        ({"prediction_type": "sample"}, "x0"),
        ({}, "eps"),
        ({"predict_epsilon": True}, "eps"),
        ({"predict_epsilon": False}, "x0"),
    ],
)
def test_predictions(path, fields, prediction):
    """The field of 2022, predict_epsilon, counts where there is no prediction_type."""
    given = {name: value for name, value in DDPM.items() if name != "prediction_type"}
    assert read_diffusion(given | fields, path).prediction == prediction


MISTAKES = [
    ({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}, ["EDMEulerScheduler", "sigma_max"]),
    ({"timestep_type": "continuous"}, ["timestep_type", "continuous"]),
    ({"use_flow_sigmas": True}, ["use_flow_sigmas"]),
    ({"snr_shift_scale": 3.0}, ["snr_shift_scale", 3]),
    ({"_class_name": "LCMScheduler"}, ["LCMScheduler"]),
    ({"beta_schedule": "sigmoid"}, ["beta_schedule", "sigmoid", "linear"]),
    ({"beta_schedule": "laplace"}, ["beta_schedule", "laplace", "linear"]),
    ({"prediction_type": "flow_prediction"}, ["prediction_type", "flow_prediction", "epsilon"]),
    ({"trained_betas": [0.1] * 10}, ["trained_betas", 1000]),
    ({"trained_betas": [0.01] * 999 + [0.02]}, ["trained_betas", "linear"]),
    ({"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr", "epsilon", 1000]),
]


@pytest.mark.parametrize(("fields", "names"), MISTAKES)
def test_other_processes_are_named(path, fields, names):
    with pytest.raises(ValueError, match=naming(path, *names)):
        read(path, **fields)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, []),
        ({"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False}, []),
        ({"clip_sample": True, "clip_sample_range": 3.0}, ["clip_sample_range", 3]),
        ({"clip_sample": False, "clip_sample_range": 3.0}, ["clip"]),
        ({"_class_name": "EulerDiscreteScheduler"}, ["clip"]),
        (
            {"thresholding": True, "dynamic_thresholding_ratio": 0.99, "sample_max_value": 1.5},
            ["thresholding", 0.99, "sample_max_value", 1.5],
        ),
        ({"variance_type": "fixed_large"}, ["fixed_large", "ddpm", "variance"]),
        ({"variance_type": "learned_range"}, ["learned_range"]),
    ],
)
def test_notes_on_what_sampling_does_otherwise(fields, names):
    notes = list(scheduler_notes(DDPM | fields))
    assert len(notes) == bool(names)
    for note in notes:
        assert re.search(naming(*names), note)


def test_what_is_written_is_read_without_notes(path):
    written = scheduler_config(Config())
    assert read_diffusion(written, path) == Config().diffusion
    assert not list(scheduler_notes(written))


LIVE = [
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear", "beta_end": 0.012}),
    ("UniPCMultistepScheduler", {"beta_start": 0.0015, "beta_end": 0.0195}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("DDPMScheduler", {"trained_betas": np.linspace(0.001, 0.01, 1000).tolist()}),
]


@pytest.mark.parametrize(("kind", "fields"), LIVE)
def test_schedulers_of_diffusers(tmp_path, kind, fields):
    """alpha**2 agrees with alphas_cumprod, which diffusers computes in float32, to 1e-4."""
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, kind)(**fields)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    found = read_diffusion(json.loads(path.read_text()), path)
    ours = build_schedule(Config(diffusion=found)).alpha[1:] ** 2
    np.testing.assert_allclose(ours, theirs.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-6)
