"""What the fault tests share: how often something was tried, and the table of it that ends `make faults`."""

from collections import Counter
from collections.abc import Callable

import pytest

from tests.fixtures.tried import PROPERTY, ROUNDS, Tried


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Tried:
    """Reports that a test has tried something so many times."""
    return lambda what, number: record_property(f"{PROPERTY}{what}", number)


@pytest.fixture(autouse=True)
def _tried_once(request: pytest.FixtureRequest, tried: Tried) -> None:
    """A test with the marker `tries(what)` is one try."""
    marker = request.node.get_closest_marker("tries")
    if marker is not None:
        tried(marker.args[0], 1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was tried in tests that passed, if it was tried for long."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, number in report.user_properties:
            if report.when == "call" and name.startswith(PROPERTY):
                counts[name.removeprefix(PROPERTY)] += number
    if ROUNDS > 1 and counts:
        terminalreporter.write_line("| tried, without a failure | times |\n| --- | ---: |")
        for what in sorted(counts):
            terminalreporter.write_line(f"| {what} | {counts[what]:,} |")
