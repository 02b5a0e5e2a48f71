"""Every example of the documentation runs, and prints what the page says it prints.

The ```python blocks of a page run in their order, in one namespace and in an empty folder, as a reader would paste
them. A ```text block that follows one (with nothing but empty lines between) is its output, `...` standing for
anything. A block that cannot run here is fenced as ```py. A page that needs PostgreSQL reads `DATABASE_URL`.
"""

import contextlib
import doctest
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import needs

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)

# Pages whose examples are files of a user's, which tests/test_pytest_plugin.py, test_write_your_own.py and
# tests/integrations/test_queue_recipes.py run.
SUITES = {"docs/how-to/tests.md", "docs/how-to/write-your-own.md", "docs/how-to/arq.md", "docs/how-to/rq.md"}

# Pages about a framework that is none of dbscope's extras.
OF_OTHERS = {
    "aiohttp.md": ("aiohttp",),
    "apscheduler.md": ("apscheduler",),
    "dramatiq.md": ("dramatiq",),
    "litestar.md": ("litestar", "httpx"),
    "pyramid.md": ("pyramid.config", "pyramid_tm", "zope.sqlalchemy"),
    "quart.md": ("quart",),
    "taskiq.md": ("taskiq",),
    "tornado.md": ("tornado",),
}

# Extras whose integrations the pages import, and the package of each.
FRAMEWORKS = {
    "flask": "flask",
    "click": "click",
    "typer": "typer",
    "ipython": "IPython",
    "celery": "celery",
    "prometheus": "prometheus_client",
    "structlog": "structlog",
}


class Example(NamedTuple):
    """A block of code, the output that the page shows for it, and the line where it stands."""

    code: str
    output: str | None
    line: int


def examples(page: str) -> list[Example]:
    """The examples of a page, in their order."""
    return [Example(found[1], found[2], page[: found.start()].count("\n") + 2) for found in FENCED.finditer(page)]


def complaint(example: Example, printed: str) -> str | None:
    """What differs between the printed and the shown output."""
    wanted = doctest.Example("", example.output or "")
    if example.output is None or doctest.OutputChecker().check_output(wanted.want, printed, doctest.ELLIPSIS):
        return None
    return f"line {example.line}: " + doctest.OutputChecker().output_difference(wanted, printed, 0)


@pytest.mark.parametrize("page", [p for p in PAGES if str(p.relative_to(ROOT)) not in SUITES], ids=lambda p: p.name)
def test_examples_run(page, tmp_path, monkeypatch, request):
    """Each page's examples run one after the other and print what the page shows."""
    found = examples(page.read_text(encoding="utf-8"))
    if any("AsyncDatabase" in example.code for example in found):
        needs.module("greenlet", extra="async")
        needs.module("aiosqlite", extra="aiosqlite")
    for extra, package in FRAMEWORKS.items():
        if any(f"dbscope.integrations.{extra}" in example.code for example in found):
            needs.module(package, extra=extra)
            monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    if any("import FastAPI" in example.code or "FastAPI," in example.code for example in found):
        needs.module("fastapi", extra="fastapi")
        needs.module("httpx", extra="demo")
    for framework in OF_OTHERS.get(page.name, ()):
        needs.package(framework)
    if any("DATABASE_URL" in example.code for example in found):
        monkeypatch.setenv("DATABASE_URL", request.getfixturevalue("postgres_url"))
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    # Frameworks look for the file that a function comes from; a worker of xdist's has none.
    (tmp_path / "example.py").write_text("\n".join(example.code for example in found))
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "example.py"), raising=False)
    for example in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example.code, "example.py", "exec", dont_inherit=True), namespace)
        assert complaint(example, printed.getvalue()) is None
    for database in [value for value in namespace.values() if type(value).__name__ == "Database"]:
        database.dispose()


def test_the_first_example_of_the_readme_works_when_pasted(tmp_path):
    """The README's example is a whole program of about twenty lines: in a file of its own it prints what it says."""
    first = examples((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    assert len(first.code.splitlines()) <= 25
    (tmp_path / "example.py").write_text(first.code, encoding="utf-8")
    # Python 3.13 tells of a connection that is in the pool when the process ends, as it is meant to be in a script.
    command = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "example.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert first.output
    assert complaint(first, done.stdout) is None


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """What a page links to in this repository is there."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_architecture_page_names_every_room():
    """A new module is not forgotten on the page that leads newcomers to it."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {
        path.stem for path in (ROOT / "src" / "dbscope").iterdir() if path.name[0] not in "._" and path.stem != "py"
    }
    assert not [room for room in sorted(rooms) if not re.search(rf"\b{room}\b", page)]
