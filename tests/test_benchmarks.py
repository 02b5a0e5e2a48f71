"""`make bench`: what is compared with other libraries can be measured, and answers right."""

from contextlib import ExitStack

import pytest

from benchmarks import measure
from benchmarks.frameworks import framework_rows
from benchmarks.measure import Contender, Missing, Row
from benchmarks.rows import Server, rows
from tests.support import needs

pytestmark = pytest.mark.programs


def beside_others(server):
    """The rows that other libraries are in."""
    table = [*rows(server), *framework_rows(server)]
    return [(row, place) for row, place in table if any(one.needs for one in row.contenders)]


@pytest.fixture(scope="module")
def server():
    """PostgreSQL, started if a row asks for it."""
    with ExitStack() as stack:
        yield Server(stack)


@pytest.fixture
def short(monkeypatch):
    """Each contender runs once, instead of as often as can be timed."""
    monkeypatch.setattr(measure, "SLICE", 0.0)
    monkeypatch.setattr(measure, "LONG_SLICE", 0.0)


@pytest.mark.parametrize("name", [row.name for row, _ in beside_others(Server(ExitStack()))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # other libraries, of what they use
def test_a_row_with_other_libraries_can_be_measured(name, server, short):
    """Each of them runs; and in the rows about frameworks its answer is looked at."""
    row, place = next((row, place) for row, place in beside_others(server) if row.name == name)
    for module in {module for one in row.contenders for module in one.needs}:
        needs.package(module)
    try:
        with place() as names:
            results = measure.measure(row, 1, names, lambda done: None)
    except Missing as missing:
        needs.missing(str(missing))
    assert [one.contender.name for one in results] == [one.name for one in row.contenders]


def test_a_row_stands_without_a_library_that_is_not_installed():
    """Its note says which is left out."""
    row = Row("sums", [Contender("ours", "1 + 1"), Contender("theirs", "2", needs=("no_such_library",))], note="sums")
    here = row.here()
    assert [one.name for one in here.contenders] == ["ours"]
    assert here.note == "sums; without theirs: no_such_library is not installed"


@pytest.mark.parametrize(("status", "body"), [(500, b"100"), (200, b"")])
async def test_an_application_that_fails_is_not_measured(status, body):
    """It would look quick."""
    from benchmarks.frameworks import BALANCE_OF, acheck

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with pytest.raises(AssertionError, match="answered with"):
        await acheck(app, BALANCE_OF)
