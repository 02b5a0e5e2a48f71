"""The plugin, and the page on tests: small suites of users, run for real."""

from pathlib import Path

import pytest

from tests.support import needs, shop

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "tests.md"
OPTIONS = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-W", "error")  # Hypothesis is half the start
WITH_ASYNCIO = ("-o", "asyncio_default_fixture_loop_scope=function")
WITHOUT = ("-p", "no:asyncio")


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with a small application in it, for the tests of a user."""
    shop.write(pytester.path)
    return pytester


@pytest.fixture
def async_suite(suite: pytest.Pytester) -> pytest.Pytester:
    """The same with an async database."""
    needs.module("aiosqlite", extra="aiosqlite")
    shop.write(suite.path, is_async=True)
    return suite


def run(suite: pytest.Pytester, *options: str) -> pytest.RunResult:
    """Run the user's tests in a process of their own, with or without pytest-asyncio."""
    return suite.runpytest_subprocess(*OPTIONS, *(options or WITH_ASYNCIO))


def page() -> dict[str, dict[str, str]]:
    """The examples of the page, by section and file name."""
    found: dict[str, dict[str, str]] = {}
    title, code = "", None
    for line in PAGE.read_text().splitlines():
        if line == "```python":
            code = []
        elif line == "```" and code is not None:
            found.setdefault(title, {})[code[0].removeprefix("# ")] = "\n".join(code)
            code = None
        elif code is not None:
            code.append(line)
        elif line.startswith("#"):
            title = line.lstrip("# ")
    return found


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "passed"),
    [
        ("Test code that uses the database", 2),
        ("With the fixtures of the plugin", 3),
        ("Functions given to `on_commit`", 2),
    ],
)
def test_the_examples_of_the_page_work(suite, title, passed):
    """What the page on tests shows is run as it stands."""
    for name, code in page()[title].items():
        (suite.path / name).write_text(code)
    run(suite).assert_outcomes(passed=passed)


def test_the_async_example_works_with_pytest_asyncio(async_suite):
    """The async fixture of the page, as it stands, under pytest-asyncio."""
    for name, code in page()["Async databases"].items():
        (async_suite.path / name).write_text(twice_over(code))
    run(async_suite).assert_outcomes(passed=2)


def test_the_async_example_works_with_anyio(async_suite):
    """The same with the changes that its comments say, under AnyIO."""
    needs.module("anyio", extra="async")
    for name, code in page()["Async databases"].items():
        code = code.replace("import pytest_asyncio", "import pytest").replace(
            "@pytest_asyncio.fixture", "@pytest.fixture"
        )
        (async_suite.path / name).write_text(twice_over(code.replace("pytest.mark.asyncio", "pytest.mark.anyio")))
    conftest = async_suite.path / "conftest.py"
    conftest.write_text(conftest.read_text() + "\n\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n")
    run(async_suite, *WITHOUT).assert_outcomes(passed=2)


def twice_over(code: str) -> str:
    """An example with its test in it twice: the second has another loop, and must start clean."""
    head, mark, test = code.partition("@pytest.mark.asyncio" if "mark.asyncio" in code else "@pytest.mark.anyio")
    return code if not mark else f"{head}{mark}{test}\n\n{mark}{test.replace('def test_', 'def test_again_')}"


# -- off unless asked ------------------------------------------------------------------------------------------------


def test_the_plugin_does_nothing_by_itself(pytester):
    """A project that merely has dbscope installed gets neither its test helpers nor anything async."""
    pytester.makepyfile(
        """
        import sys

        def test_nothing_is_imported():
            assert "dbscope.pytest_plugin" in sys.modules
            assert not {"dbscope.testing", "dbscope.aio", "anyio"} & sys.modules.keys()
        """
    )
    run(pytester, *WITHOUT, "-p", "no:anyio").assert_outcomes(passed=1)


def test_an_unknown_database_is_asked_for(suite):
    """Without `dbscope_databases` the fixtures say what to define."""
    suite.makepyfile("def test_a(dbscope_sandbox):\n    pass\n")
    result = run(suite)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*define a fixture `dbscope_databases` in conftest.py*"])


# -- leaks -----------------------------------------------------------------------------------------------------------

DATABASES = """
import pytest
from shop import db

@pytest.fixture
def dbscope_databases():
    return db
"""


def test_failure_30_what_is_left_open_fails_that_test_by_name(suite):
    """FAILURES 30: the test that left a scope open is named and fails, and the next starts clean."""
    suite.makeconftest(DATABASES)
    suite.makepyfile(
        test_jobs="""
        import pytest
        from dbscope import current_scope, scope
        from shop import Order, count_orders, db

        pytestmark = pytest.mark.usefixtures("dbscope_sandbox")

        def test_leak():
            scope("job").__enter__()
            db.session.add(Order(item="tea"))
            db.session.commit()
            db.session.get(Order, 1)

        def test_next():
            assert current_scope() is None
            assert count_orders() == 0
        """
    )
    result = run(suite)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["*LeftOpenError: test test_jobs.py::test_leak ended, but scope 'job' (opened at *_jobs.py:8) is still open*"]
    )


def test_failure_30_a_thread_that_outlives_its_test_is_told_which(suite):
    """FAILURES 30, "owner exited": the error that a leaked thread gets names the test that owned its session."""
    suite.makeconftest(DATABASES)
    suite.makepyfile(
        test_jobs="""
        import threading
        from dbscope import scope
        from sqlalchemy import text
        from shop import db

        going, go, told = threading.Event(), threading.Event(), []

        def job():
            with scope("job"):
                db.session.scalar(text("SELECT 1"))
                going.set()
                go.wait(30)
                try:
                    db.session.scalar(text("SELECT 1"))
                except Exception as error:
                    told.append(str(error))

        thread = threading.Thread(target=job, name="late")

        def test_leak(dbscope_sandbox):
            thread.start()
            going.wait(30)

        def test_next(dbscope_sandbox):
            go.set()
            thread.join()
            assert "scope 'job'" in told[0]
            assert "thread 'late'" in told[0]
            assert "but test test_jobs.py::test_leak ended" in told[0]
        """
    )
    run(suite).assert_outcomes(passed=2, errors=1)


# -- whose context ---------------------------------------------------------------------------------------------------

CONTEXT = """
import pytest
{imports}
from dbscope import current_scope, scope
from dbscope.testing import sandbox
from shop import adb, acount_orders, aplace_order

{fixture}
async def in_a_scope():
    async with sandbox(adb), scope("a fixture") as work:
        yield work

{mark}
async def test_a_scope_of_an_async_fixture(in_a_scope):
    assert current_scope() is in_a_scope
    await aplace_order("tea")
    assert await acount_orders() == 1
    assert in_a_scope.has(adb)

{mark}
async def test_a_scope_of_a_sync_fixture(dbscope_scope):
    assert current_scope() is dbscope_scope

{mark}
async def test_no_scope_is_left_behind():
    assert current_scope() is None
"""


def test_a_fixtures_scope_is_the_tests_with_pytest_asyncio(async_suite):
    """Fixtures and tests share their context under pytest-asyncio, as the page says."""
    async_suite.makepyfile(
        CONTEXT.format(imports="import pytest_asyncio", fixture="@pytest_asyncio.fixture", mark="@pytest.mark.asyncio")
    )
    run(async_suite).assert_outcomes(passed=3)


def test_a_fixtures_scope_is_the_tests_with_anyio(async_suite):
    """And under AnyIO."""
    needs.module("anyio", extra="async")
    backend = "@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'"
    async_suite.makepyfile(CONTEXT.format(imports=backend, fixture="@pytest.fixture", mark="@pytest.mark.anyio"))
    run(async_suite, *WITHOUT).assert_outcomes(passed=3)
