"""The layers of the package: a file imports only from its own layer or from one above it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
MATHEMATICS = {
    "schedule", "process", "denoiser", "sampler", "solvers", "sde", "likelihood", "loss", "distillation", "testing",
}  # fmt: skip
LAYERS = [
    MATHEMATICS,
    {"nn", "data", "devices"},
    {"checkpoint", "config", "build"},
    {"interop", "inference"},
    {"training", "evaluation"},
    {"bench"},
    {"cli"},
]
FILES = [
    path for path in sorted((ROOT / "diffjax").rglob("*.py")) if path.parent.name != "diffjax" or path.stem[0] != "_"
]


def room(path):
    """The file or folder of the package that a file belongs to, as in "schedule" or "nn"."""
    return path.relative_to(ROOT / "diffjax").with_suffix("").parts[0]


def layer(name):
    return next(i for i, rooms in enumerate(LAYERS) if name in rooms)


def imports(path):
    """The rooms of diffjax, and the packages from outside, that a file imports."""
    ours, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "diffjax":
            ours |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("diffjax."):
            ours.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom):
            foreign.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
    return ours, foreign


def test_every_file_belongs_to_a_layer():
    assert {room(path) for path in FILES} == set().union(*LAYERS)


def test_imports_point_one_way():
    for path in FILES:
        known = {"checkpoint": {"training"}, "inference": {"evaluation"}}.get(room(path), set())  # to be mended
        below = {name for name in imports(path)[0] if layer(name) > layer(room(path))}
        assert below <= known, f"{path} imports from layers below its own: {below}"


def test_the_mathematics_imports_jax_and_numpy_alone():
    allowed = {"jax", "numpy", "collections", "functools", "itertools", "math", "typing"}
    extra = {"likelihood": {"diffrax"}, "testing": {"hypothesis", "pytest", "sys", "dataclasses"}}
    for path in FILES:
        if room(path) in MATHEMATICS:
            foreign = imports(path)[1] - allowed - extra.get(room(path), set())
            assert not foreign, f"{path} imports {foreign}"


def test_no_random_key_has_a_default():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                arguments += [argument for argument, default in pairs if default is not None]
                assert not {a.arg for a in arguments} & {"key", "keys", "seed"} or path.parent.name == "nn"
