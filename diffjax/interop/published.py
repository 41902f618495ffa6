"""A published network, and the fields of its config.json."""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from diffjax.nn.conditioning import Conditioning
from diffjax.nn.registry import NetworkConfig

# The fields that diffusers' EMAModel writes beside a network's own.
EMA_FIELDS = {
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma",
    "power",
}  # fmt: skip


class Published(NamedTuple):
    """A network that was read from a published file."""

    network: NetworkConfig
    x_shape: tuple[int, ...]
    conditioning: Conditioning
    params: Any
    notes: tuple[str, ...] = ()  # sentences on what was found, chosen or left out


class Part(NamedTuple):
    """A network as diffusers stores it."""

    settings: dict[str, Any]  # of config.json
    tensors: dict[str, Any]
    metadata: dict[str, str]  # of the file of tensors


class Fields:
    """The fields of a config.json, with diffusers' defaults."""

    def __init__(self, given: dict[str, Any], defaults: dict[str, Any], path: Path) -> None:
        """The fields of a file, whose values are not checked yet."""
        self._given, self._defaults, self._path = given, defaults, path

    def __getitem__(self, name: str) -> Any:
        """The value of a field."""
        return self._given.get(name, self._defaults[name])

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise a ValueError of the file, the field, its value and what is expected."""
        value = self._given.get(name, self._defaults.get(name))
        raise ValueError(f"{self._path} has {name} {value!r}: {expected}")

    def check_values(self, allowed: dict[str, tuple[Any, ...]], network: str) -> None:
        """Check that fields have one of the values that a network here can honour.

        Raises: ValueError, naming the first field that has not.
        """
        for name, values in allowed.items():
            if self[name] not in values:
                self.refuse(name, f"the {network} here has {' or '.join(map(repr, values))}")

    def check_known(self, network: str) -> None:
        """Check that all fields have a default, but for empty ones.

        Raises: ValueError, naming the first one.
        """
        known = set(self._defaults) | EMA_FIELDS
        for name, value in self._given.items():
            if name not in known and not name.startswith("_") and value not in (None, False):
                self.refuse(name, f"the {network} here has no such field")
