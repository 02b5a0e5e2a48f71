"""What `import dbscope` offers."""

import ast
from pathlib import Path

import pytest

import dbscope
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
