"""A scope for each command of a click program."""

from collections.abc import Callable
from typing import Any

from dbscope.errors import ConfigurationError
from dbscope.integrations._commands import in_scope, refuse_commit, refuse_old
from dbscope.scope import Commit

try:
    import click
except ImportError as error:
    raise ImportError(
        'scopes for click commands need click 8.1 or newer: pip install "dbscope[click]"', name=error.name
    ) from error

__all__ = ["Scopes"]

_INSTALLED = "_dbscope_scopes"


class Scopes:
    """Runs each command of a click program in a scope that is named by the command's path, such as `shop orders list`.

    The commands of a group are those it has, those it gets later, and those it loads when they are called; groups in
    it included. The function of a group is a piece of work of its own. A command that calls another, by
    `ctx.invoke()`, does so in its own scope.

    Args:
        command: a command, or the group of all.
        commit: None, and commands commit by themselves; `"on-success"`, and each is one managed transaction for each
            database that it uses: committed if it returns, or exits with the code 0; rolled back if it exits with
            another, aborts, complains about its usage, or raises.

    Raises:
        ConfigurationError: this is no command, or has scopes already; or an option is not one of these.

    >>> @click.group()
    ... def shop(): ...
    >>> scopes = Scopes(shop, commit="on-success")
    """

    def __init__(self, command: click.Command, *, commit: Commit = None) -> None:
        refuse_commit(commit)
        refuse_old("click", "8.1")
        if not isinstance(command, click.Command):
            raise ConfigurationError(
                f"the scopes of a click program are given its command or group, not {command!r}. "
                "For Typer use dbscope.integrations.typer."
            )
        if hasattr(command, _INSTALLED):
            raise ConfigurationError(f"{command!r} has scopes already. Install them once, on the outermost group.")
        self.commit = commit
        self._install(command)

    def _install(self, command: click.Command) -> None:
        if hasattr(command, _INSTALLED):
            return
        setattr(command, _INSTALLED, self)
        if command.callback is not None:
            command.callback = in_scope(command.callback, self.commit, click.exceptions.Exit)
        group: Any = command
        if hasattr(group, "resolve_command"):
            group.resolve_command = self._resolving(group.resolve_command)

    def _resolving(self, resolve: Callable[..., Any]) -> Callable[..., Any]:
        """`Group.resolve_command`, through which every command is found, whenever and wherever it was added."""

        def resolve_command(*args: Any) -> Any:
            found = resolve(*args)
            if found[1] is not None:
                self._install(found[1])
            return found

        return resolve_command
