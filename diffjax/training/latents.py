"""The autoencoder of a training on latents, which its run folder keeps a copy of."""

import shutil
from pathlib import Path

import jax

from diffjax.build import ModelInfo
from diffjax.data.latents import AUTOENCODER, complete_manifest
from diffjax.inference.autoencoder import TrainedAutoencoder, load_autoencoder
from diffjax.inference.model import TrainedModel, stored_autoencoder


def keep_autoencoder(
    info: ModelInfo, workdir: Path, teacher: TrainedModel | None = None
) -> TrainedAutoencoder | None:
    """The autoencoder of the latents to train on; None for images.

    Process 0 puts a copy into the run folder. teacher: of a student.

    Raises: ValueError if the run or the teacher has another one, or the folder of the latents.
    """
    if not info.autoencoder:
        return None
    path = Path(info.config.data.path or "")
    manifest, found = complete_manifest(path), load_autoencoder(path / AUTOENCODER)
    if (manifest.autoencoder, manifest.scaling, manifest.shift) != found.space:
        raise ValueError(
            f"{path / AUTOENCODER} is another autoencoder than the one that encoded {path}: encode"
            " the images again"
        )
    if teacher is not None and teacher.autoencoder is not None:
        _check_same(path, found, teacher.name, teacher.autoencoder)
    copy = workdir / AUTOENCODER
    if copy.exists():
        _check_same(path, found, str(workdir), stored_autoencoder(workdir, info.autoencoder))
    elif jax.process_index() == 0:
        copy_autoencoder(path, workdir)
    return found


def copy_autoencoder(source: Path, workdir: Path) -> None:
    """Copy the autoencoder of a run, or of latents, into a run folder.

    It is there whole or not at all.

    Raises: OSError for a folder that cannot be read or written.
    """
    part = workdir / f"{AUTOENCODER}.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source / AUTOENCODER, part)
    part.rename(workdir / AUTOENCODER)


def _check_same(
    path: Path, ours: TrainedAutoencoder, owner: str, theirs: TrainedAutoencoder
) -> None:
    for name, a, b in zip(("weights", "scaling", "shift"), ours.space, theirs.space, strict=True):
        if a != b:
            raise ValueError(
                f"data.path is {path}, whose autoencoder has the {name} {a}, and that of {owner}"
                f" has {b}: use latents of the same one"
            )
