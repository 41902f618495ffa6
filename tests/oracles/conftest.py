"""Runs of oracles."""

import pytest

from tests.oracles.oracle import SPREAD, configuration, write_images, write_run


@pytest.fixture(scope="package")
def images(tmp_path_factory):
    """A file of 240 images."""
    return write_images(tmp_path_factory.mktemp("data") / "two.npz", 240, SPREAD)


@pytest.fixture(scope="package")
def run(images, tmp_path_factory):
    """A run whose moving average is exact, and whose parameters lean by 0.4."""
    folder = tmp_path_factory.mktemp("runs") / "exact"
    return write_run(folder, configuration(images), ema=0.0, raw=0.4)


@pytest.fixture(scope="package")
def worse_run(images, tmp_path_factory):
    """A run that leans by 0.2."""
    return write_run(tmp_path_factory.mktemp("runs") / "worse", configuration(images), ema=0.2)
