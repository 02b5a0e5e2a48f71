"""An import may only point down: the rooms of dbscope, from the lowest to the highest, and a check of every import."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "dbscope"

# A room is a module or a package directly below dbscope. It may import the rooms listed before it, and no others.
INDEX = "__init__"
FLOORS = [
    # 0: words everyone shares, no behaviour
    ["errors", "events"],
    # 1: the core, the only code that begins, commits, closes
    [
        "where",
        "conflicts",
        "statements",
        "plan",
        "interrupt",
        "hooks",
        "ending",
        "sqlite",
        "settings",
        "terms",
        "engines",
        "apart",
        "capacity",
        "lockwatch",
        "closings",
        "lifecycle",
        "aborted",
        "outcome",
        "connection",
        "session",
        "commit",
        "generators",
        "scope",
        "implicit",
        "ids",
        "loop",
        "fanout",
        "fork",
        "holders",
        "instrument",
        "retry",
        "transaction",
        "registry",
        "database",
        "aio",
        "watched",
    ],
    # 2: watch facts, never steer; and what `import dbscope` offers, with its guards at work
    ["monitor", "guards", INDEX, "testing", "conformance"],
    # 3: edges: glue, no policy
    ["integrations", "compat", "cli", "pytest_plugin", "__main__"],
]
ROOMS = [room for floor in FLOORS for room in floor]
NEED_ONLY_SQLALCHEMY = {room for floor in FLOORS[:2] for room in floor} | {"monitor", "guards", INDEX}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and the line that imports it."""

    name: str
    line: int
    lazy: bool


class Imports(ast.NodeVisitor):
    """Collects the imports of one module, those inside functions and under TYPE_CHECKING included."""

    def __init__(self, package: list[str], rooms: list[str]) -> None:
        self.package = package  # where relative imports start
        self.rooms = rooms
        self.found: list[Import] = []
        self.depth = 0

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [Import(alias.name, node.lineno, self.depth > 0) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parents = self.package[: len(self.package) - node.level + 1] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        for alias in node.names:
            names_a_room = module == "dbscope" and alias.name in self.rooms
            self.found.append(Import(f"{module}.{alias.name}" if names_a_room else module, node.lineno, self.depth > 0))

    def visit_later(self, node: ast.AST) -> None:
        """Visit what does not run when the module is imported."""
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_later

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            self.visit_later(node)
        else:
            self.generic_visit(node)


def offences(package: Path) -> Iterator[str]:
    """Yield one line, with file and line number, for each import that points the wrong way."""
    files = sorted(package.rglob("*.py"))
    rooms = sorted({file.relative_to(package).with_suffix("").parts[0] for file in files})
    for room in rooms:
        if room not in ROOMS:
            yield f"{room}: on no floor; put it into FLOORS in {Path(__file__).name}, after what it has to import"
    for file in files:
        path = file.relative_to(package)
        room = path.with_suffix("").parts[0]
        if room not in ROOMS:
            continue
        imports = Imports(["dbscope", *path.parts[:-1]], rooms)
        imports.visit(ast.parse(file.read_text()))
        for found in imports.found:
            if complaint := judge(room, found):
                yield f"{package.name}/{path}:{found.line}: {complaint}"


def judge(room: str, found: Import) -> str | None:
    """Say what is wrong with an import made in a room, if anything is."""
    top, *below = found.name.split(".")
    if top == "dbscope":
        target = below[0] if below else INDEX
        if target == room or target not in ROOMS or ROOMS.index(target) < ROOMS.index(room):
            return None
        return f"{room} imports {target}, which is not below it"
    if room not in NEED_ONLY_SQLALCHEMY or top == "sqlalchemy" or top in sys.stdlib_module_names:
        return None
    if top == "greenlet":
        return None if found.lazy else f"{room} imports greenlet when it is imported; do it inside a function"
    return f"{room} imports {top}; `import dbscope` needs SQLAlchemy and nothing else"


def test_imports_point_down():
    """The core knows no framework, guard, monitor or command, and every room only what lies below it."""
    assert not list(offences(PACKAGE))


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("events.py", "from dbscope.scope import Scope", "events imports scope, which is not below it"),
        ("events.py", "from .scope import Scope", "events imports scope, which is not below it"),
        ("events.py", "from . import scope", "events imports scope, which is not below it"),
        ("events.py", "import dbscope.scope", "events imports scope, which is not below it"),
        ("hooks.py", "from dbscope import scope", "hooks imports scope, which is not below it"),
        ("scope.py", "from dbscope import Database", "scope imports __init__, which is not below it"),
        ("monitor/__init__.py", "from ..guards import held", "monitor imports guards, which is not below it"),
        ("monitor/__init__.py", "from dbscope.cli.top import main", "monitor imports cli, which is not below it"),
        ("scope.py", "import flask", "scope imports flask; `import dbscope` needs SQLAlchemy and nothing else"),
        ("__init__.py", "import attrs", "__init__ imports attrs; `import dbscope` needs SQLAlchemy and nothing else"),
    ],
)
@pytest.mark.parametrize(
    "place", ["{}", "def late():\n    {}", "if TYPE_CHECKING:\n    {}"], ids=["top", "late", "typing"]
)
def test_an_import_that_points_up_is_named(tmp_path, file, line, complaint, place):
    """An import that points up or sideways is named with its file and line, wherever it hides."""
    package = sample(tmp_path, {file: "import os\n" + place.format(line)})
    at = 2 + place.count("\n")
    assert list(offences(package)) == [f"dbscope/{file}:{at}: {complaint}"]


def test_imports_that_point_down_pass(tmp_path):
    """What lies below, the own room, the standard library and SQLAlchemy may be imported; greenlet, late."""
    package = sample(
        tmp_path,
        {
            "scope.py": "import asyncio\nfrom .errors import DBScopeError\nfrom sqlalchemy.orm import Session",
            "loop.py": "def late():\n    import greenlet",
            "guards/held.py": "from dbscope.events import emit\nimport dbscope.monitor\nfrom .base import Guard",
            "integrations/flask.py": "import flask\nfrom dbscope import fork\nimport dbscope.guards.held",
        },
    )
    assert not list(offences(package))


def test_greenlet_is_not_imported_with_the_package(tmp_path):
    """SQLAlchemy 2.1 has greenlet as an extra, so the core may import it inside functions only."""
    package = sample(tmp_path, {"loop.py": "import greenlet"})
    assert list(offences(package)) == [
        "dbscope/loop.py:1: loop imports greenlet when it is imported; do it inside a function"
    ]


def test_a_room_on_no_floor_is_named(tmp_path):
    """A new module has to be given its place."""
    package = sample(tmp_path, {"helpers.py": ""})
    assert list(offences(package)) == [
        "helpers: on no floor; put it into FLOORS in test_layers.py, after what it has to import"
    ]


def sample(folder: Path, files: dict[str, str]) -> Path:
    """Write a package called dbscope with these files, besides an empty scope.py, and return its folder."""
    package = folder / "dbscope"
    for name, source in {"scope.py": "", "__init__.py": "", **files}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    return package
