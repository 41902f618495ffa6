"""Run folders for models that were not trained in them."""

from pathlib import Path
from typing import Any

from diffjax.build import ModelInfo, build_optimizer
from diffjax.checkpoint import FOLDER, Checkpoints
from diffjax.training.state import init_state, state_to_trees


def write_run(info: ModelInfo, params: Any, step: int, workdir: Path) -> None:
    """Write a run folder with one checkpoint, to sample from or train further.

    step: of training. Its parameters and all of its moving averages are the same.

    Raises: ValueError for a folder that has checkpoints; OSError if it cannot be written.
    """
    if (workdir / FOLDER).is_dir():
        raise ValueError(f"{workdir} already has checkpoints: use another folder")
    optimizer, _ = build_optimizer(info.config)
    state = init_state(params, optimizer, info.config.train.averages)
    checkpoints = Checkpoints(workdir)
    trees = state_to_trees(state._replace(step=state.step + step))
    checkpoints.save(step, trees, info.to_dict())
    checkpoints.close()
