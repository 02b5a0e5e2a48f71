"""What `import dbscope` offers."""

import ast
import re
from pathlib import Path

import pytest

import dbscope
from dbscope import errors
from tests.support import needs

# The public names, sorted. A name that is missing here is not public; one that goes from here breaks its users.
PUBLIC = [
    "AsyncDatabase",
    "AttemptFailed",
    "CommitOutcomeUnknown",
    "ConfigurationError",
    "Conflict",
    "DBScopeError",
    "Database",
    "FanOutError",
    "GuardError",
    "GuardWarning",
    "Loop",
    "NoScopeError",
    "NoTransactionError",
    "NotCommittedError",
    "NotTheOwnerError",
    "OverlapError",
    "PartialCommit",
    "ReadOnlyError",
    "Retry",
    "RollbackOnlyError",
    "Scope",
    "ScopeEndedError",
    "ScopeError",
    "ScopeMisuseError",
    "ScopeWarning",
    "SelfBlockedError",
    "SentBeforeCommit",
    "TransactionAbortedError",
    "TransactionError",
    "TransactionInProgress",
    "UncommittedWrites",
    "UncommittedWritesError",
    "aend_scope",
    "begin_scope",
    "current_scope",
    "end_scope",
    "scope",
    "watch",
]


def test_public_names_are_listed():
    """A public name comes or goes only on purpose."""
    assert list(getattr(dbscope, "__all__", [])) == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    """Every public name says what the caller gets."""
    try:
        value = getattr(dbscope, name)
    except ImportError:
        needs.module("greenlet", extra="async")
        raise
    assert value.__doc__


def test_the_package_is_an_index():
    """`dbscope/__init__.py` holds a docstring, imports, `__all__` and the lazy loading of names, and nothing else."""
    docstring, *statements = ast.parse(Path(dbscope.__file__).read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert dbscope.__doc__
    assert [ast.unparse(statement) for statement in statements if not belongs_in_an_index(statement)] == []


def belongs_in_an_index(statement: ast.stmt) -> bool:
    """Tell whether a statement only names things."""
    match statement:
        case ast.Import() | ast.ImportFrom():
            return True
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name in ("__all__", "__version__")
        case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=[]):
            return all(map(belongs_in_an_index, body))
        case ast.FunctionDef(name=name):
            return name in ("__getattr__", "__dir__")
    return False


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    """Who catches an error by its base catches what the tree at the top of `dbscope.errors` shows below it."""
    drawn = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│├└─ ]*)(\w+)", line)
        if found is not None and hasattr(errors, found[2]):
            path[len(found[1]) // 4 :] = [found[2]]
            drawn[found[2]] = path[-2] if len(path) > 1 else None
    assert {*drawn} == {*errors.__all__}
    for name, base in drawn.items():
        bases = [found.__name__ for found in getattr(errors, name).__bases__]
        assert base is None or bases[0] == base, name
