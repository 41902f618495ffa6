"""Options of `diffjax encode`: the images that are encoded, by what, and to where."""

import jax
import pytest

from diffjax.checkpoint import tree_sha256
from diffjax.cli import encode
from diffjax.inference.encoding import EncodeOptions
from tests.latents import params_of, write_autoencoder, write_images
from tests.options.observations import observes
from tests.options.probe import call


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two autoencoders, of images of their own."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for seed in (0, 1):
        images = write_images(folder / f"{seed}.npz", num=40 + 20 * seed, seed=seed)
        found.append(write_autoencoder(folder / f"run-{seed}", images, seed))
    return found


def encoding(run, *words):
    """What arrives: autoencoder, configuration, data set, folder and options."""
    return call((encode, "open_encoding"), "encode", run, *words).args_


@observes("encode autoencoder", "encode --out")
def test_autoencoder(runs, tmp_path):
    """The weights and the images are the autoencoder's own, the folder is the one named."""
    for seed, run in enumerate(runs):
        autoencoder, config, dataset, folder, _ = encoding(run, "--out", tmp_path / str(seed))
        assert autoencoder.checksum == tree_sha256(params_of(seed))
        assert config.data.path == str(run.parent / f"{seed}.npz")
        assert len(dataset.train) + len(dataset.held_out) == 40 + 20 * seed
        assert folder == tmp_path / str(seed)


@observes("encode --data.path", "encode --data.config")
def test_images(runs, tmp_path, probe_config, images):
    """They are those of the path, or of the configuration."""
    words = "--out", tmp_path / "a"
    _, config, dataset, *_ = encoding(runs[0], *words, "--data.path", runs[0].parent / "1.npz")
    assert config.data.path == str(runs[0].parent / "1.npz")
    assert len(dataset.train) + len(dataset.held_out) == 60
    _, config, *_ = encoding(runs[0], *words, "--data.config", probe_config)
    assert config.data.path == str(images)


@observes("encode --batch", "encode --mirror", "encode --dtype")
def test_options(runs, tmp_path):
    """Each arrives; a batch is a multiple of the devices."""
    words = "--out", tmp_path / "a"
    assert encoding(runs[0], *words)[-1] == EncodeOptions(batch=64)
    given = encoding(runs[0], *words, "--batch 20 --mirror --dtype float16")[-1]
    assert given == EncodeOptions(batch=24, mirror=True, dtype="float16")


@observes("encode --distributed", "encode --processes", "encode --process")
def test_processes(runs, tmp_path):
    """They arrive in JAX, which connects the processes."""
    words = "encode", runs[0], "--out", tmp_path / "a"
    place = jax.distributed, "initialize"
    address = call(place, *words, "--distributed host:123 --processes 5 --process 3")
    assert (address.args_, address.kwargs) == (("host:123", 5, 3), {})
    automatic = call(place, *words, "--distributed auto")
    assert (automatic.args_, automatic.kwargs) == ((), {})
