"""The command `diffjax`, which is also `python -m diffjax`.

A command is a module of this folder, with typed `Options` and a function `run` that takes them. It
is imported when it is chosen, so that help does not wait for JAX. Nothing imports the commands.
"""

import importlib
import sys
from collections.abc import Sequence

import diffjax

GROUPS: dict[str, dict[str, str]] = {
    "Training": {
        "train": "Train a diffusion model, or resume its training.",
        "average": "Average the parameters of a run over its training.",
        "encode": "Encode images to latents, to train a model of latents.",
        "distill": "Distill a trained model into models of few steps.",
        "dry-run": "Print the cost of training and sampling, also on absent TPUs.",
    },
    "Sampling": {
        "sample": "Sample images from a trained model.",
        "edit": "Reconstruct, interpolate, vary or inpaint images.",
        "demo": "Compare DDPM, DDIM and guided DDIM on a model of digits.",
    },
    "Evaluation": {
        "evaluate": "Measure the image quality of one sampler.",
        "frontier": "Measure the quality and the time of many samplers.",
        "likelihood": "Measure the bits per dimension of held-out images.",
    },
    "Tools": {
        "convert": "Convert between run folders and Hugging Face folders.",
        "bench": "Measure the speed of networks, samplers, guidance and training.",
    },
}
COMMANDS = [name for group in GROUPS.values() for name in group]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command with these arguments, or with those of the command line.

    Raises: SystemExit with code 2 for a mistake of the user, 130 for Ctrl-C, or 128 plus the
    signal that interrupted training.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"diffjax {diffjax.__version__}")
    else:
        from diffjax.cli import common

        program = f"diffjax {name}" if name in COMMANDS else "diffjax"
        with common.exit_codes(program):
            _run(name, program, rest)


def _run(name: str, program: str, arguments: list[str]) -> None:
    from diffjax.cli import common
    from diffjax.config import suggest
    from diffjax.devices import cpu

    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise common.UserError(f"there is no {kind} {name!r}: {suggest(name, COMMANDS)}")
    cpu.tune()
    module = importlib.import_module(f"diffjax.cli.{name.replace('-', '_')}")
    parse = getattr(module, "parse", None)  # of commands whose defaults depend on their arguments
    options = (
        parse(program, arguments) if parse else common.parse(module.Options, program, arguments)
    )
    module.run(options)


def _help() -> str:
    lines = ["usage: diffjax COMMAND [OPTIONS]", "", "Diffusion models in JAX and Flax."]
    for title, commands in GROUPS.items():
        lines += ["", title, *(f"  {name:<12}{text}" for name, text in commands.items())]
    lines += ["", "'diffjax COMMAND --help' lists the options of a command."]
    return "\n".join(lines)
