"""The layers of the package, and the words that belong to one of them only."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffjax"
MATHEMATICS = {
    "schedule", "process", "parameterization", "denoiser", "guidance", "sampler", "solvers", "sde",
    "likelihood", "loss", "averaging", "distillation", "testing",
}  # fmt: skip
LAYERS = [  # a file imports only from its own layer or from one above it in this list
    MATHEMATICS,
    {"nn", "data", "devices"},
    {"checkpoint", "config", "build"},
    {"interop", "inference"},
    {"training", "evaluation"},
    {"bench"},
    {"cli"},
]
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or not path.stem.startswith("_")
]
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def room(path):
    """The file or folder of the package that a file belongs to, as in "schedule" or "nn"."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def layer(name):
    return next(i for i, rooms in enumerate(LAYERS) if name in rooms)


def where(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


# ----------------------------------------------------------------------------- imports


def imports(path):
    """The rooms of diffjax, and the packages from outside, that a file imports."""
    ours, foreign = set(), set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.module == "diffjax":
            modules = [f"diffjax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path, node)}: a relative import"
            modules = [node.module]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for package, *rest in (module.split(".") for module in modules):
            if package == "diffjax":
                ours |= set(rest[:1])
            else:
                foreign.add(package)
    # The package itself holds its version, and how its modules are found.
    return ours - {"__version__", "_lazy"}, foreign


def test_every_file_belongs_to_a_layer():
    assert {room(path) for path in FILES} == set().union(*LAYERS)


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS)))
def test_imports_point_one_way(name):
    for path in FILES:
        if room(path) == name:
            below = {other for other in imports(path)[0] if layer(other) > layer(name)}
            assert not below, f"{path.relative_to(ROOT)} imports from a layer below: {below}"


def test_mathematics_imports_jax_and_numpy_alone():
    allowed = {"jax", "numpy", "collections", "functools", "itertools", "math", "types", "typing"}
    extra = {"likelihood": {"diffrax"}, "testing": {"hypothesis"}}
    for path in FILES:
        if room(path) in MATHEMATICS:
            foreign = imports(path)[1] - allowed - extra.get(room(path), set())
            assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


# ----------------------------------------------------------------------------- arguments


def test_no_random_key_has_a_default():
    """But in nn/, where keys are those of dropout, and None is no dropout."""
    for path in FILES:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.FunctionDef) and room(path) != "nn":
                arguments = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                arguments += [argument for argument, default in pairs if default is not None]
                names = {argument.arg for argument in arguments}
                assert not names & {"key", "keys", "seed"}, where(path, node)


# ----------------------------------------------------------------------------- words


def test_only_the_command_line_names_its_options():
    """Flags of XLA are none of its options."""
    option, found = re.compile(r"(?<![\w-])--(?!xla_)[a-z][\w.-]*"), []
    for path, tree in TREES.items():
        if room(path) != "cli":
            strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
            for node in strings:
                if isinstance(node.value, str) and (flags := option.findall(node.value)):
                    found.append(f"{where(path, node)}: {' '.join(flags)}")
    assert not found, "\n".join(found)


# Networks have their names in nn/, and published ones in interop/. Elsewhere only for a reason:
ABOUT_UNET = {
    "config.py": {"UNetConfig", "unet"},  # the network of a configuration that names none
    "bench/diffusers_baseline.py": {"UNet2DModel"},  # it runs it by diffusers
}


def test_only_networks_mention_the_unet():
    """But in the names of models, as in "unet of digits"."""
    found = []
    for path in FILES:
        if room(path) not in ("nn", "interop"):
            allowed = ABOUT_UNET.get(path.relative_to(PACKAGE).as_posix(), set())
            for number, line in enumerate(path.read_text().splitlines(), 1):
                words = set(re.findall(r"\w*unet\w*\b(?! of )", line, re.IGNORECASE)) - allowed
                found += [f"{path.relative_to(ROOT)}:{number}: {word}" for word in sorted(words)]
    assert not found, "\n".join(found)


# Conditions are any pytree, and x is any array. These files are about labels and images:
ABOUT_LABELS = {
    "evaluation/digits.py": {"label", "labels"},  # the classes of a classifier
    "evaluation/features.py": {"label", "labels"},  # the classes of a classifier
    "evaluation/frontier.py": {"label", "labels"},  # the legend of a plot
    "evaluation/quality.py": {"labels", "image_shape"},  # accuracy of classes; decoded images
    "inference/model.py": {"image_shape"},  # of decoded images
    "inference/editing.py": {"image_shape"},  # of images to encode
    "inference/encoding.py": {"image_shape"},  # of images to encode
}


def identifiers(tree):
    """The names that code defines and uses: not the methods that it calls, nor their keywords."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node
        elif isinstance(node, ast.Attribute) and id(node) not in called:
            yield node.attr, node
        elif isinstance(node, ast.arg):
            yield node.arg, node
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node


def test_models_have_conditions_and_x():
    """Code for any model has no labels and no shape of an image where any condition and x go."""
    found = []
    for path in FILES:
        if room(path) in ("inference", "training", "evaluation"):
            allowed = ABOUT_LABELS.get(path.relative_to(PACKAGE).as_posix(), set())
            for word, node in identifiers(TREES[path]):
                if word in {"label", "labels", "image_shape"} - allowed:
                    found.append(f"{where(path, node)}: {word}")
    assert not found, "\n".join(found)


# ----------------------------------------------------------------------------- docstrings

COLUMNS = 80
FRAGMENT = re.compile(r"(Of|Which|What|Where|Whether|As in|The same)\b")


def documented(node):
    """A module and the public classes, functions and methods in it, not those within functions."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from documented(child)
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            yield child


def test_docstrings_begin_with_a_sentence():
    found = []
    for path, tree in TREES.items():
        for node in documented(tree):
            first = (ast.get_docstring(node) or "").split("\n")[0]
            if len(first) > COLUMNS or not first.endswith(".") or FRAGMENT.match(first):
                line = getattr(node, "lineno", 1)
                found.append(f"{path.relative_to(ROOT)}:{line}: {len(first)} {first!r}")
    assert not found, "\n".join(found)
