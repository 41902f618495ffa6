"""Every option of every command has an observation."""

import pytest

from diffjax.cli import main
from diffjax.config import Config, flat_fields
from tests.options.observations import OBSERVED, all_options, import_all, options_of, programs
from tests.options.values import DATA, DIFFUSION, NETWORK, TRAIN


def test_every_option_is_observed():
    """It fails for an option without an observation, and for an observation of none."""
    import_all()
    options = all_options()
    missing = [option for option in options if option not in OBSERVED]
    assert not missing, f"{len(missing)} of {len(options)} unobserved:\n" + "\n".join(missing)
    assert sorted(set(OBSERVED) - set(options)) == []


@pytest.mark.parametrize("command", ["train", "sample", "distill", "edit vary", "bench training"])
def test_names_are_as_typed(command, capsys):
    """The inventory has the names that the help text has."""
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    options = [name for name in options_of(dict(programs())[command]) if name.startswith("-")]
    assert [name for name in options if f" {name}" not in text] == []


def test_values():
    """The tables of values have every field of a configuration, none of them its default."""
    fields = {name: value for name, value in flat_fields(Config()).items() if "distill" not in name}
    values = {
        name.replace("-", "_"): value
        for name, (_, value) in (DATA | NETWORK | DIFFUSION | TRAIN).items()
    }
    assert set(values) == set(fields)
    assert [name for name, value in values.items() if value == fields[name]] == []
