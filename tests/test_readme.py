"""What README quotes and shows is what the code does."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_library_example_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scope = {}
    exec(blocks[0], scope)
    assert scope["images"].shape == (16, 8, 8, 1)


def test_the_readme_quotes_the_code_and_names_its_laws():
    section = (ROOT / "README.md").read_text().split("## Reading a diffusion paper")[1].split("\n## ")[0]
    quotes = re.findall(r"`(\w+)` in\s`(diffjax/\w+\.py)`\.\n\n```py\n(.*?)```", section, re.S)
    assert [function for function, _, _ in quotes] == ["ddpm_step", "ddim_step", "guided_estimate", "probability_flow"]
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
