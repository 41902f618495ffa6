"""Tables that need no trained network are what the library prints."""

import re

from diffjax import sampler, schedule, testing
from tests.docs.pages import ROOT


def between(page, name):
    """The text between the marks of a name."""
    text = (ROOT / "docs" / page).read_text()
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S).group(1)


def test_plan():
    """The plan of the page on concepts."""
    levels = schedule.linear(1000)
    plan = sampler.ddim(levels, schedule.trailing(levels, 4), eta=0.5)
    assert between("concepts.md", "plan").strip("`\n").splitlines() == str(plan).splitlines()


def test_orders():
    """The measured orders of the page on samplers."""
    table = between("samplers.md", "orders")
    for name, (order, warm) in testing.ORDERS.items():
        slopes = " | ".join(
            f"{slope:.2f}" for slope in testing.measured_order(testing.MAKERS[name], warm=warm)
        )
        row = f"| `{name}`{', from exact history' if warm else ''} | {order} | {slopes} |"
        assert row in table, row
