"""The options of all commands, and the register of the tests that observe them.

An observation is a test that would fail if the program ignored the option, inverted it, or took
another option's value for it. It says so by `observes`:

    @observes("train --train.keep")
    def test_keep(...): ...
"""

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path

import tyro

from diffjax import cli
from diffjax.inference.samplers import SAMPLERS
from diffjax.nn.dit import DiTConfig

OBSERVED: dict[str, list[str]] = {}  # names of tests, by option


def observes(*options):
    """Register a test as the observation of options, each as in "train --train.keep"."""

    def register(test):
        for option in options:
            OBSERVED.setdefault(option, []).append(f"{test.__module__}.{test.__name__}")
        return test

    return register


def import_all():
    """Import all files of observations, as pytest does, so that they are registered."""
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.options.{path.stem}")


def programs() -> Iterator[tuple[str, type]]:
    """Every command with its options, as ("train", Options) or ("edit vary", Vary)."""
    for command in cli.COMMANDS:
        module = importlib.import_module(f"diffjax.cli.{command.replace('-', '_')}")
        parts = typing.get_args(module.Options)
        for part in parts:
            kind, *marks = typing.get_args(part)
            yield f"{command} {next(mark.name for mark in marks if hasattr(mark, 'name'))}", kind
        if not parts:
            yield command, module.Options


def options_of(kind, prefix="") -> Iterator[str]:
    """The options of a dataclass as the user types them; positional ones by their field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        marks = getattr(hints[field.name], "__metadata__", ())
        name = prefix + field.name.replace("_", "-")
        group = None
        if field.default_factory is not dataclasses.MISSING:
            group = type(field.default_factory())
        if tyro.conf.Suppress in marks:
            continue
        if group is None or not dataclasses.is_dataclass(group):
            yield field.name if tyro.conf.Positional in marks else f"--{name}"
        else:
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            omitted = unnamed or tyro.conf.OmitArgPrefixes in marks
            yield from options_of(group, "" if omitted else f"{name}.")


OTHER_NETWORKS = {"dit": DiTConfig}  # their own options, as "dit --network.patch"


def all_options() -> list[str]:
    """Every option of every command, of other networks, and of a sampler's text."""
    found = [f"{name} {option}" for name, kind in programs() for option in options_of(kind)]
    for name, kind in OTHER_NETWORKS.items():
        found += [f"{name} {option}" for option in options_of(kind, "network.")]
    found += [f"sampler {name}({option})" for name in SAMPLERS for option in SAMPLERS[name].options]
    return found
