"""The weights of a run folder, whatever its network."""

from pathlib import Path
from typing import Any, NamedTuple

from diffjax.build import ModelInfo, abstract_params, build_module
from diffjax.checkpoint import ema_key, open_checkpoint
from diffjax.devices import parallel


class RunWeights(NamedTuple):
    """The parameters of a checkpoint, and what is stored beside them."""

    info: ModelInfo
    params: Any  # replicated over all devices
    weights: str  # as they were asked for
    step: int


def load_weights(workdir: Path, step: int | None = None, weights: str = "ema") -> RunWeights:
    """Load the parameters of a run folder.

    step: the checkpoint's training step, None for the latest. weights: "ema", the first moving
    average; the decay of one, as "0.9999"; or "raw", the parameters as trained.

    Raises: FileNotFoundError where there is none; ValueError for weights that it has not.
    """
    checkpoints, step = open_checkpoint(workdir, step)
    info = ModelInfo.from_dict(checkpoints.config(step))
    decays = [str(decay) for decay in info.config.train.ema]
    keys = {"ema": ema_key(0), "raw": "params"}
    keys |= {decay: ema_key(i) for i, decay in enumerate(decays)}
    if weights not in keys:
        raise ValueError(
            f"weights is {weights!r}: use ema, raw, or the decay of a moving average,"
            f" {' or '.join(decays)}"
        )
    like = abstract_params(info, build_module(info))
    sharding = parallel.replicated(parallel.device_mesh())
    params = checkpoints.restore_weights(step, keys[weights], like, sharding)
    checkpoints.close()
    return RunWeights(info, params, weights, step)
