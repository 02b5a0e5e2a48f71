"""What click and Typer share: the scope of a command, its name, and whether it is committed."""

import functools
import inspect
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from dbscope.errors import ConfigurationError
from dbscope.scope import Colour, Commit, PlacedScope
from dbscope.scope import _current as _current_scope

_WRAPPED = "_dbscope_command"


class CommandScope(PlacedScope):
    """The scope of one command of a shell's."""

    __slots__ = ()


def refuse_commit(commit: object) -> None:
    """Raise where an option of `Scopes` is none."""
    if commit is not None and commit != "on-success":
        raise ConfigurationError(f'commit is None or "on-success", not {commit!r}.')


def refuse_old(package: str, least: str) -> None:
    """Raise where a package is older than its scopes need."""
    version = metadata.version(package)
    if [*map(int, version.split(".")[:2])] < [*map(int, least.split("."))]:
        raise ConfigurationError(
            f"scopes need {package} {least} or newer, and this is {version}: pip install -U {package}"
        )


def in_scope(callback: Callable[..., Any], commit: Commit, exits: type[BaseException]) -> Callable[..., Any]:
    """A command's function, each call of which runs in a scope; one that another command calls works in that one's.

    Args:
        callback: the function.
        commit: as for `scope`.
        exits: what `ctx.exit()` raises; with the code 0 that is success, as `sys.exit(0)` is.
    """
    if hasattr(callback, _WRAPPED):
        return callback
    code = getattr(inspect.unwrap(callback), "__code__", None)

    @functools.wraps(callback)
    def command(*args: Any, **kwargs: Any) -> Any:
        if isinstance(current := _current_scope.get(), CommandScope) and not current.ended:
            return callback(*args, **kwargs)
        work = CommandScope(_command_path() or callback.__name__, (code, 0) if code else None, commit=commit)
        work.enter(Colour.SYNC)
        try:
            result = callback(*args, **kwargs)
        except BaseException as error:
            failed = None if _succeeded(error, exits) else error
            work.__exit__(type(failed) if failed else None, failed, None)
            raise
        work.__exit__(None, None, None)
        return result

    setattr(command, _WRAPPED, True)
    return command


def _succeeded(error: BaseException, exits: type[BaseException]) -> bool:
    if isinstance(error, SystemExit):
        return error.code is None or error.code == 0
    return isinstance(error, exits) and not getattr(error, "exit_code", 1)


def _command_path() -> str | None:
    """The command that runs, as its user has typed it; Typer has a click of its own from 0.25 on."""
    for name in ("typer._click.globals", "click.globals"):
        module: Any = sys.modules.get(name)
        context = None if module is None else module.get_current_context(silent=True)
        if context is not None:
            return str(context.command_path)
    return None
