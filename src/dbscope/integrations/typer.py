"""A scope for each command of a Typer program."""

from collections.abc import Callable
from typing import Any

from dbscope.errors import ConfigurationError
from dbscope.integrations._commands import in_scope, refuse_commit, refuse_old
from dbscope.scope import Commit

try:
    import typer
except ImportError as error:
    raise ImportError(
        'scopes for Typer commands need Typer 0.12 or newer: pip install "dbscope[typer]"', name=error.name
    ) from error

__all__ = ["Scopes"]

_INSTALLED = "_dbscope_scopes"


class Scopes:
    """Runs each command of a Typer program in a scope that is named by the command's path: as for click.

    The commands are those it has and those it gets later, its callback, and the programs that `add_typer()` adds.

    Args:
        app: the program.
        commit: as for `dbscope.integrations.click.Scopes`.

    Raises:
        ConfigurationError: this is no Typer program, or has scopes already; or an option is not one of these.

    >>> app = typer.Typer()
    >>> scopes = Scopes(app, commit="on-success")
    """

    def __init__(self, app: typer.Typer, *, commit: Commit = None) -> None:
        refuse_commit(commit)
        refuse_old("typer", "0.12")
        if not isinstance(app, typer.Typer):
            raise ConfigurationError(f"the scopes of a Typer program are given the program, not {app!r}.")
        if hasattr(app, _INSTALLED):
            raise ConfigurationError(f"{app!r} has scopes already. Install them once, on the outermost program.")
        self.commit = commit
        self._install(app)

    def _install(self, app: Any) -> None:
        if hasattr(app, _INSTALLED):
            return
        setattr(app, _INSTALLED, self)
        for info in (*app.registered_commands, *filter(None, [app.registered_callback])):
            if info.callback is not None:
                info.callback = self._in_scope(info.callback)
        for group in app.registered_groups:
            self._install(group.typer_instance)
        app.command = self._wrapping(app.command)
        app.callback = self._wrapping(app.callback)
        app.add_typer = self._adding(app.add_typer)

    def _in_scope(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return in_scope(function, self.commit, typer.Exit)

    def _wrapping(self, register: Callable[..., Any]) -> Callable[..., Any]:
        """`Typer.command` or `Typer.callback`, which keeps the function in its scope, and gives back the plain one."""

        def registering(*args: Any, **options: Any) -> Callable[..., Any]:
            decorate = register(*args, **options)

            def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
                decorate(self._in_scope(function))
                return function

            return decorator

        return registering

    def _adding(self, add_typer: Callable[..., None]) -> Callable[..., None]:
        def adding(app: typer.Typer, **options: Any) -> None:
            self._install(app)
            add_typer(app, **options)

        return adding
