"""The forward process of diffusers' scheduler_config.json, both ways.

A scheduler is a sampler too; only the process is read, and what sampling here does otherwise is
said in notes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffjax import schedule
from diffjax.config import BETAS, Config, Diffusion

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
# Values of fields with which the process, or what the network is told of it, is another one.
OTHER_PROCESS = {
    "timestep_type": lambda value: value not in (None, "discrete"),
    "use_flow_sigmas": bool,
    "snr_shift_scale": lambda value: value not in (None, 1),
    "sigma_max": lambda value: value is not None,
}
CONSISTENCY = ("LCMScheduler", "TCDScheduler")
FLOW = "FlowMatchEulerDiscreteScheduler"


def read_diffusion(given: dict[str, Any], path: Path) -> Diffusion:
    """The forward process and the prediction of a scheduler's configuration.

    Raises: ValueError, naming the file and the field, for what is none of DDPM's, nor flow
    matching's.
    """
    kind = given.get("_class_name", "the scheduler")
    if kind == FLOW:
        return _read_flow(given, path)
    other = [name for name, is_other in OTHER_PROCESS.items() if is_other(given.get(name))]
    if other or not {"beta_schedule", "num_train_timesteps"} <= set(given):
        reason = f" ({other[0]} {given[other[0]]!r})" if other else ""
        raise ValueError(
            f"{path} describes {kind}, of another process than DDPM's, which has a beta_schedule"
            + reason
        )
    if kind in CONSISTENCY:
        raise ValueError(f"{path} describes {kind}, of consistency models: they cannot be read")
    named = given
    if given.get("trained_betas") is not None:
        named = given | _name_betas(given["trained_betas"], given["num_train_timesteps"], path)
    T = named["num_train_timesteps"]
    form: Any = _known(named, "beta_schedule", SCHEDULES, path)
    default = {"prediction_type": "sample" if given.get("predict_epsilon") is False else "epsilon"}
    prediction: Any = _known(default | named, "prediction_type", PREDICTIONS, path)
    betas = named.get("beta_start", 0.0001), named.get("beta_end", 0.02)
    is_default = form not in BETAS or np.allclose(betas, _default_betas(form, T), rtol=1e-9)
    terminal = bool(given.get("rescale_betas_zero_snr", False))
    if terminal and prediction == "eps":
        raise ValueError(
            f"{path} has rescale_betas_zero_snr and prediction_type 'epsilon', which does not"
            f" determine x0 at level {T}, where no signal is left: use v_prediction or sample"
        )
    return Diffusion(
        schedule=form,
        betas=None if is_default else betas,
        prediction=prediction,
        T=T,
        zero_terminal_snr=terminal,
    )


def _read_flow(given: dict[str, Any], path: Path) -> Diffusion:
    for name in ("use_dynamic_shifting", "invert_sigmas"):
        if given.get(name):
            raise ValueError(
                f"{path} has {name} {given[name]!r}: only one shift for all sizes can be read, and"
                " sigma from 1 to 0"
            )
    T = given.get("num_train_timesteps", 1000)
    return Diffusion(
        schedule="flow",
        shift=float(given.get("shift", 1.0)),
        prediction="flow",
        T=T,
        time_scale=float(T),
    )


def scheduler_notes(given: dict[str, Any], *, is_latent: bool = False) -> Iterator[str]:
    """Sentences on what the scheduler does otherwise than sampling does by default.

    is_latent: sampling does not clip latents.
    """
    kind = given.get("_class_name", "DDPMScheduler")
    variance = given.get("variance_type", "fixed_small")
    if str(variance).startswith("learned"):
        yield f"the scheduler has the variance {variance}: plans use a fixed one"
    elif variance != "fixed_small":
        yield f"the scheduler has the variance {variance}: the sampler ddpm has an option variance"
    if given.get("thresholding"):
        ratio, largest = (
            given.get("dynamic_thresholding_ratio", 0.995),
            given.get("sample_max_value", 1.0),
        )
        yield (
            f"the scheduler has thresholding, at the quantile {ratio} and to"
            f" sample_max_value {largest:g} at most: sampling clips x0 unless it is given a"
            " threshold"
        )
    elif is_latent == bool(given.get("clip_sample", kind.startswith(("DDPM", "DDIM")))):
        yield (
            "the scheduler clips x0, which sampling of latents does not"
            if is_latent
            else "the scheduler does not clip x0, which sampling does by default"
        )
    elif given.get("clip_sample_range", 1.0) != 1:
        yield (
            f"the scheduler has clip_sample_range {given['clip_sample_range']:g}: sampling clips x0"
            " to -1 and 1 by default"
        )


def scheduler_config(config: Config, *, is_latent: bool = False) -> dict[str, Any]:
    """The scheduler_config.json of a configuration's process.

    is_latent: DDIM's, which does not clip x0, in place of DDPM's.

    Raises: ValueError for a schedule or a prediction that diffusers does not have.
    """
    d = config.diffusion
    if d.schedule == "flow" and d.prediction == "flow" and d.time_scale == d.T:
        return {"_class_name": FLOW, "num_train_timesteps": d.T, "shift": d.shift}
    names = {ours: name for name, ours in SCHEDULES.items()}
    if d.schedule not in names:
        raise ValueError(
            f"diffusion.schedule is {d.schedule}, and diffusers has only {', '.join(names)}"
        )
    predictions = {ours: name for name, ours in PREDICTIONS.items()}
    if d.prediction not in predictions:
        raise ValueError(
            f"diffusion.prediction is {d.prediction}, and diffusers has only"
            f" {', '.join(predictions)} with the schedule {d.schedule}"
        )
    first, last = d.betas or _default_betas(d.schedule, d.T)
    of_kind = {"_class_name": "DDPMScheduler", "variance_type": "fixed_small"}
    return (of_kind if not is_latent else {"_class_name": "DDIMScheduler"}) | {
        "num_train_timesteps": d.T,
        "beta_schedule": names[d.schedule],
        "beta_start": first,
        "beta_end": last,
        "rescale_betas_zero_snr": d.zero_terminal_snr,
        "clip_sample": not is_latent,
        "prediction_type": predictions[d.prediction],
        "timestep_spacing": "trailing",
    }


def _known(given: dict[str, Any], name: str, known: dict[str, str], path: Path) -> str:
    value = given[name]
    if value not in known:
        raise ValueError(f"{path} has {name} {value!r}: only {', '.join(known)} can be read")
    return known[value]


def _default_betas(form: str, T: int) -> tuple[float, float]:
    # The meaning of betas None; for cosine, which has none, the values that diffusers writes.
    betas = {"linear": (0.1 / T, 20 / T), "scaled_linear": (0.85 / T, 12 / T)}
    return betas.get(form, (0.0001, 0.02))


def _name_betas(betas: Any, T: int, path: Path) -> dict[str, Any]:
    """The named schedule that has these betas, as fields of a scheduler's configuration."""
    betas = np.asarray(betas, np.float64)
    if betas.shape != (T,):
        raise ValueError(
            f"{path} has trained_betas of shape {betas.shape} and num_train_timesteps {T}: use one"
            " beta for each"
        )
    given, ends = schedule.from_betas(betas), (float(betas[0]), float(betas[-1]))
    tables = {name: BETAS[ours](T, *ends) for name, ours in SCHEDULES.items() if ours in BETAS}
    tables["squaredcos_cap_v2"] = schedule.cosine(T)
    for name, table in tables.items():
        # Betas are often stored as they were computed, in float32.
        if np.allclose(table.alpha, given.alpha, rtol=1e-4, atol=0):
            return {"beta_schedule": name, "beta_start": ends[0], "beta_end": ends[1]}
    raise ValueError(
        f"{path} has trained_betas of another schedule than {', '.join(SCHEDULES)}, which alone can"
        " be read"
    )
