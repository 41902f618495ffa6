"""A tiny network: times are not tested, but that each is there, with what is the same anywhere."""

import pytest

from diffjax.config import Config
from diffjax.nn.unet import UNetConfig

TINY = Config(
    network=UNetConfig(channels=4, multipliers=(1,), blocks=1, attention=(), norm_groups=1)
)


@pytest.fixture
def tiny(monkeypatch):
    """Configurations of any name have a tiny network."""
    monkeypatch.setattr("diffjax.bench.models.load_config", lambda name: TINY)
    return TINY


@pytest.fixture(autouse=True)
def ends_of_bars(bars):
    """Every bar ends at its total."""
    return bars
