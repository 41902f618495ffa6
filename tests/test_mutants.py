"""The faults that make mutants plants."""

import pytest

from tools.faults import Source
from tools.mutants import TIME, Options, Suite, draw, paths_of

FAULTS = {
    "call()": {"pass"},
    "not call(a, flip=1)": {"not call(a)", "not call(a, flip=2)"},
    "not call(a, b)": {"not call(b, a)"},
    "not call(a=x, b=y)": {"not call(b=y)", "not call(a=x)", "not call(a=y, b=x)"},
    "x = 0.5": {"x = 5.0", "pass"},
    "x: bool = True": {"x: bool = False"},
    "x: int = 3": set(),
    "a < b": {"a <= b"},
    "a not in b": {"a in b"},
    "a and b": {"a or b"},
    "a - b": {"a + b"},
    "if a: call()": {"if (not (a)): call()", "if a: pass"},
    "[a for a in b if c]": {"[a for a in b if (not (c))]"},
    "def f(a, b: A[3]):\n return a": {"def f(a, b: A[3]):\n return b"},
    '"""About 3 and 4."""': set(),
    "raise ValueError(f'{a} is 3', 4)": set(),
    "not call(help=3)": set(),
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults(text, tmp_path):
    (tmp_path / "file.py").write_text(text)
    mutants = [fault.mutant() for fault in Source(tmp_path, "file.py").faults()]
    assert {mutant.new for mutant in mutants if mutant} == FAULTS[text] - {text}


def test_place_and_lines(tmp_path):
    """A mutant is told by file, line, and the lines that change; letters may take more bytes."""
    (tmp_path / "file.py").write_text("ä = 'ä'\nif ä == b:\n    ö = 1\n")
    mutants = [fault.mutant() for fault in Source(tmp_path, "file.py").faults()]
    assert [m.describe() for m in mutants if m and m.line == 3] == [
        "file.py:3\n-    ö = 1\n+    pass",
        "file.py:3\n-    ö = 1\n+    ö = 2",
    ]


def test_draw():
    """The same seed draws the same mutants; they stand where places say."""
    at = ("diffjax/data/codec.py", "diffjax/data/files.py")
    first, again, other = (draw(Options(num=4, seed=seed, at=at)) for seed in (0, 0, 1))
    assert first == again != other
    assert {m.path for m in draw(Options(num=99, at=at))} == set(at)
    place = f"{other[0].path}:{other[0].line}"
    assert other[0] in draw(Options(num=99, at=(place,)))


def test_every_file_but_the_mathematics():
    paths = paths_of(Options().root)
    assert {"diffjax/config.py", "diffjax/build.py", "diffjax/nn/unet.py"} < set(paths)
    assert not {"diffjax/sampler.py", "diffjax/testing.py", "diffjax/__init__.py"} & set(paths)


@pytest.mark.slow
def test_a_fault_is_caught_by_the_test_of_its_name(tmp_path):
    """And by one that reaches it through another file."""
    sources = {
        "diffjax/__init__.py": "",
        "diffjax/data/__init__.py": "",
        "diffjax/data/half.py": "def half(x):\n    return x / 2\n",
        "diffjax/data/user.py": "from diffjax.data.half import half\n",
        "tests/data/test_half.py": "def test_half(): pass\n",
        "tests/test_user.py": "from diffjax.data import user\n\n\ndef test():\n"
        "    assert user.half(2) == 1\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "compiled").mkdir()
    suite, path = Suite(tmp_path, tmp_path / "compiled"), "diffjax/data/half.py"
    assert suite.near(path) == ["tests/data/test_half.py", "tests/test_user.py"]
    (fault,) = draw(Options(num=1, root=tmp_path, at=(path,)))
    assert suite.judge(tmp_path, fault, 60) == "tests/test_user.py::test"
    assert (tmp_path / path).read_text() == sources[path]
    assert suite.run(tmp_path, suite.near(path), 60) == ""
    (tmp_path / "tests/test_user.py").write_text("def test():\n    while True: pass")
    assert suite.run(tmp_path, suite.near(path), 2) == TIME
