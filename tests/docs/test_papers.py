"""The quotes of the page on papers are the code, and the tests that it names exist."""

import re

from tests.docs.pages import ROOT

PAPERS = (ROOT / "docs" / "papers.md").read_text()
QUOTES = re.findall(
    r"`(\w+)` in\s`(diffjax/\w+\.py)`\.\n\n```\{\.python \.quote\}\n(.*?)```", PAPERS, re.S
)


def test_quotes_are_the_code():
    """Each quoted line is in the function that it is said to be in."""
    names = [function for function, _, _ in QUOTES]
    assert names == [
        "ddpm_step", "ddim_step", "guided_estimate", "probability_flow", "x0_from_flow",
    ]  # fmt: skip
    for function, file, lines in QUOTES:
        body = (ROOT / file).read_text().split(f"def {function}(")[1].split("\n\n\n")[0]
        assert lines.rstrip() in body, function


def test_named_tests_exist():
    """Each test that the page names is in its file."""
    named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", PAPERS)
    assert len(named) >= 8
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
