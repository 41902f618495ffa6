"""A plugin of pytest: the quickest tests first, by the time that they took before.

SIGPROF ends them after PROCESSOR_SECONDS, which processes that they start do not inherit.

The file that QUICK_FIRST names has a line "SECONDS TEST" for each phase of a test that has run.
"""

import math
import os
import signal
from collections import defaultdict
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Start the clock."""
    signal.setitimer(signal.ITIMER_PROF, float(os.environ["PROCESSOR_SECONDS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by doublings of the longest time; tests that have never run stand first."""
    seconds: defaultdict[str, float] = defaultdict(float)
    if (path := Path(os.environ["QUICK_FIRST"])).exists():
        for line in path.read_text().splitlines():
            time, _, test = line.partition(" ")
            seconds[test] = max(seconds[test], float(time))
    items.sort(key=lambda item: round(math.log2(max(seconds[item.nodeid], 0.5))))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the time of a phase; one write, since other processes write too."""
    with Path(os.environ["QUICK_FIRST"]).open("a") as file:
        file.write(f"{report.duration:.3f} {report.nodeid}\n")
