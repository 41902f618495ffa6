"""The house keeps its shape: rooms import only from rooms above them, and nothing points out of it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the top of the house to the bottom.
ROOMS = [
    "schedule", "process", "denoiser", "sampler", "solvers", "sde", "loss",
    "models.layers", "models.unet", "models.inception",
    "picture", "plans",
    "training.step", "training.distill", "training.parallel", "training.sources", "training.data",
    "training.checkpoint", "training.loop", "training.curve",
    "evaluation.record", "evaluation.metrics", "evaluation.digits", "evaluation.likelihood",
    "evaluation.features", "evaluation.frontier", "evaluation.report",
    "testing",
    "experiment", "interop.diffusers", "cpu", "cli", "run", "students", "quality", "dryrun", "editing",
    "bench.timing", "bench.subject", "bench.peers", "bench.loop", "bench.guidance", "bench.networks",
    "bench.first_image", "bench.training", "demo", "bench.__main__", "edit", "evaluate", "pareto", "convert",
]  # fmt: skip
MATHEMATICS = ROOMS[:7]


def room(path):
    return ".".join(path.relative_to(ROOT / "diffjax").with_suffix("").parts)


def imports(path):
    """Modules of diffjax, and packages from outside."""
    ours, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffjax"):
            base = node.module.removeprefix("diffjax").lstrip(".")
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            ours |= {name if name in ROOMS else base for name in names}
        elif isinstance(node, ast.ImportFrom):
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return ours, foreign


FILES = [path for path in sorted((ROOT / "diffjax").rglob("*.py")) if path.name != "__init__.py"]


def test_every_file_is_a_room():
    assert sorted(map(room, FILES)) == sorted(ROOMS)


def test_imports_point_one_way():
    for path in FILES:
        above = set(ROOMS[: ROOMS.index(room(path))])
        assert imports(path)[0] <= above, f"{path.name} imports from below: {imports(path)[0] - above}"


def test_the_mathematics_imports_jax_and_numpy_alone():
    for path in FILES:
        if room(path) in MATHEMATICS:
            assert imports(path)[1] <= {"jax", "numpy", "collections", "functools", "itertools", "math", "typing"}, (
                path.name
            )


def test_no_random_key_has_a_default():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                arguments += [argument for argument, default in pairs if default is not None]
                assert not {a.arg for a in arguments} & {"key", "keys", "seed"} or path.parent.name == "models"


def test_the_library_example_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope = {}
    exec(blocks[0], scope)
    assert scope["images"].shape == (16, 8, 8, 1)


def test_the_readme_quotes_the_code_and_names_its_laws():
    section = (ROOT / "README.md").read_text().split("## Reading a diffusion paper")[1].split("\n## ")[0]
    quotes = re.findall(r"`(\w+)` in\s`(diffjax/\w+\.py)`\.\n\n```py\n(.*?)```", section, re.S)
    assert [function for function, _, _ in quotes] == ["ddpm_step", "ddim_step", "extrapolate", "probability_flow"]
    for function, file, lines in quotes:
        body = (ROOT / file).read_text().split(f"def {function}(")[1].split("\n\n\n")[0]
        assert lines.rstrip() in body, f"{function} is quoted otherwise than it is"
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", section))
    assert len(named) >= 8
    for name in named:
        assert f"def {name}(" in tests, f"{name} is no test"


def test_the_laws_of_the_readme_hold_for_its_sampler():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope = {}
    exec(blocks[1], scope)
    laws = [value for name, value in scope.items() if name.startswith("test_")]
    assert len(laws) == 2
    for law in laws:
        law()
