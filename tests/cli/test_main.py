"""The command `diffjax` itself: help, version, exit codes."""

import dataclasses
import importlib
import importlib.metadata
import re
import subprocess
import sys
import typing

import pytest
from helpers import check_mistake, check_told

import diffjax
from diffjax import cli
from diffjax.cli import COMMANDS, common, main, plain_help
from diffjax.config import Config, config_names


def option_names(kind, prefix=""):
    """The options of a dataclass by the names of its fields, nested ones with their prefix."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        text = str(hints[field.name])
        inner = typing.get_origin(hints[field.name]) is typing.Annotated
        bare = typing.get_args(hints[field.name])[0] if inner else hints[field.name]
        bare = kind.__dataclass_fields__[field.name].default_factory if "Network" in text else bare
        if "Suppress" in text:
            continue
        if dataclasses.is_dataclass(bare):
            flat = "OmitArgPrefixes" in text or "name=''" in text
            yield from option_names(bare, prefix if flat else f"{prefix}{field.name}.")
        elif "Positional" not in text:
            yield f"--{prefix}{field.name}".replace("_", "-")


def kinds(command):
    """The dataclasses of options of a command, each with the words that choose it."""
    options = importlib.import_module(f"diffjax.cli.{command.replace('-', '_')}").Options
    if dataclasses.is_dataclass(options):
        return [([command], options)]
    parts = [typing.get_args(part) for part in typing.get_args(options)]
    return [([command, conf.name], kind) for kind, conf in parts]


def printed(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def test_help_lists_commands(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines if line.startswith("  ")] == COMMANDS
        assert all(line.endswith(".") for line in lines if line.startswith("  "))
        assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option(command, capsys):
    for words, kind in kinds(command):
        out = printed([*words, "--help"], capsys)
        expected = set(option_names(kind))
        assert expected
        assert expected <= set(re.findall(r"--[\w.-]+", out))
        assert not re.search(r"--distillation\.", out)  # written by `diffjax distill`, no option


PAGES = [words for command in COMMANDS for words, _ in kinds(command)]
PAGES += [["edit"], ["bench"], ["train", "cifar10"], ["dry-run", "digits"]]


def test_help_is_plain(monkeypatch, capsys):
    """No type of Python is in it, and no line is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    main([])
    pages = [capsys.readouterr().out] + [printed([*words, "--help"], capsys) for words in PAGES]
    for page in pages:
        found = re.findall(
            r"\{None\}|\|\s*None|None\s*\||\b(?:INT|STR|FLOAT)\b|default:\W+\)|\.\.\.\]", page
        )
        assert found == [], page
        assert [line for line in page.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("{None}|STR", "TEXT"),
        ("{None}|{FLOAT FLOAT}", "X X"),
        ("{None}|{[INT [INT ...]]}", "N ..."),
        ("[FLOAT [FLOAT ...]]", "X ..."),
        ("{None}|{a,b}", "{a,b}"),
        ("INT|FLOAT", "N|X"),
    ],
)
def test_plain_metavars(written, plain):
    assert plain_help.plain_metavar(written) == plain


@pytest.mark.parametrize("command", ["train", "dry-run"])
def test_help_shows_the_configuration(command, capsys):
    """Its own values as defaults, whether help is asked for before or after its name."""
    assert all(name in printed([command, "--help"], capsys) for name in config_names())
    out = printed([command, "cifar10", "--help"], capsys)
    assert re.search(r"--train\.batch\s+N[^(]+\(default:\s+128\)", out.replace("│", ""))
    assert "CONFIG" in out


def test_options_of_another_network(tmp_path, monkeypatch, capsys):
    """The options are those of the configuration's network class, and no others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "other_network.py").write_text(
        "from dataclasses import dataclass\n"
        "from diffjax.nn.registry import NetworkConfig\n"
        "@dataclass(frozen=True)\n"
        "class Other(NetworkConfig):\n"
        "    patch: int = 2\n"
        '    """Width of a patch."""\n'
    )
    (tmp_path / "own.py").write_text(
        "from other_network import Other\n"
        "from diffjax.config import Config\n"
        "config = Config(network=Other(patch=4))\n"
    )
    out = printed(["train", str(tmp_path / "own.py"), "--help"], capsys)
    assert "--network.patch" in out
    assert "--network.dropout" in out
    assert "--network.channels" not in out
    options = common.parse_with_config(
        importlib.import_module("diffjax.cli.train").Options,
        "diffjax train",
        [str(tmp_path / "own.py"), "--workdir", "x", "--network.patch", "8"],
    )
    assert (options.experiment.network.patch, type(options.experiment)) == (8, Config)
    command = f"train {tmp_path / 'own.py'} --workdir x --network.channels 8"
    check_mistake(main, command, "network.channels", capsys)


def test_version(capsys):
    main(["--version"])
    out = capsys.readouterr().out
    assert out == f"diffjax {importlib.metadata.version('diffjax')}\n"
    assert diffjax.__version__ in out


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("trian", ("trian", "train")),
        ("--versoin", "--versoin"),
        ("edit inpant x", ("inpant", "inpaint")),
        ("edit", "reconstruct"),
        ("edit inpaint", "MODEL"),
        ("bench netwroks", ("netwroks", "networks")),
        ("sample", "MODEL"),
        ("train --workdir x digits", ("--workdir", "CONFIG")),
    ],
)
def test_mistakes(command, names, capsys):
    check_mistake(main, command, names, capsys)


SENTENCES = {
    "train digitz --workdir x": (
        "diffjax train: there is no configuration 'digitz': did you mean 'digits'?"
    ),
    "train digits --workdir x --train.stepz 5": (
        "diffjax train: there is no option '--train.stepz': did you mean '--train.steps'?"
    ),
    "train digits": "diffjax train: --workdir is missing (see diffjax train --help)",
    "train digits --workdir x --train.steps 0": (
        "diffjax train: train.steps is 0: use a number above 0"
    ),
    "trian": "diffjax: there is no command 'trian': did you mean 'train'?",
}


@pytest.mark.parametrize("command", SENTENCES)
def test_sentences(command, capsys):
    """Examples of messages, word by word. All other tests of errors leave their wording free."""
    with pytest.raises(SystemExit):
        main(command.split())
    assert capsys.readouterr().err == SENTENCES[command] + "\n"


def test_exit_codes(capsys):
    with pytest.raises(SystemExit) as end, common.exit_codes("diffjax sample"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    capsys.readouterr()
    for error in (ValueError("steps is 0"), OSError(28, "No space left", "runs/x")):
        with (
            pytest.raises(SystemExit) as end,
            common.exit_codes("diffjax sample"),
            common.user_errors(),
        ):
            raise error
        names = ("steps", "0") if isinstance(error, ValueError) else ("No space left", "runs/x")
        check_told(end.value.code, capsys.readouterr().err, names)
    with pytest.raises(ValueError, match="defect"), common.exit_codes("diffjax sample"):
        raise ValueError("a defect")  # of ours: its traceback is wanted


def test_help_does_not_import_jax():
    """Each command imports what it needs when it is chosen."""
    script = (
        "import sys; from diffjax.cli import main; main(['--help']); main(['--version']);"
        " sys.exit('jax' in sys.modules or 'tyro' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["sample.py", "train.py"])
def test_scripts(name, run_program):
    """The scripts are the commands of their names."""
    code, out, err = run_program(name, "--help")
    assert (code, err) == (0, "")
    assert f"usage: diffjax {name.removesuffix('.py')} " in out


def test_numbers():
    assert common.parse_numbers("levels", "1, 2.5,1") == [1.0, 2.5, 1.0]
    assert common.parse_integers("steps", "2, 10,2") == [2, 10]
    for parse, text in ((common.parse_numbers, "1,x"), (common.parse_integers, "1.5")):
        with pytest.raises(ValueError, match=f"steps is '{text}'"):
            parse("steps", text)


def test_summaries_are_sentences():
    summaries = [text for group in cli.GROUPS.values() for text in group.values()]
    assert all(re.fullmatch(r"[A-Z][^.]+\.", text) for text in summaries)
