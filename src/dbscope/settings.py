"""What a block asks of its transaction: isolation level, read-only, deferrable, time-outs; and how the server is told.

What shapes the BEGIN travels with the engine's execution options (engines.py): after it, it is too late. Time-outs are
set for the transaction alone, in one trip right after the BEGIN: nothing is left to the connection's next user, be
there a pooler between that gives each transaction another server connection.
"""

import math
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypedDict

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from dbscope import sqlite
from dbscope.errors import ConfigurationError

__all__ = ["Isolation", "Seconds", "SettingOptions", "Settings", "milliseconds", "settings_of"]

Isolation = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
Seconds: TypeAlias = float | timedelta

LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")
LONGEST = 2**31 / 1000 - 1  # in seconds: PostgreSQL counts milliseconds in 32 bits

# What PostgreSQL calls them, and the SQLSTATE with which each strikes.
_POSTGRESQL = {
    "statement_timeout": ("statement_timeout", "57014"),
    "lock_timeout": ("lock_timeout", "55P03"),
    "idle_timeout": ("idle_in_transaction_session_timeout", "25P03"),
    "timeout": ("transaction_timeout", "25P04"),
}
_BY_CODE = {code: name for name, (_, code) in _POSTGRESQL.items()}


class SettingOptions(TypedDict, total=False):
    """The options of `transaction()` that the server is told of; see there."""

    isolation: Isolation
    read_only: bool
    deferrable: bool
    statement_timeout: Seconds
    lock_timeout: Seconds
    idle_timeout: Seconds
    timeout: Seconds


@dataclass(frozen=True, slots=True)
class Settings:
    """What one block asks for, checked; None where it asks for nothing. Times are in seconds."""

    isolation: Isolation | None = None
    read_only: bool | None = None
    deferrable: bool | None = None
    statement_timeout: float | None = None
    lock_timeout: float | None = None
    idle_timeout: float | None = None
    timeout: float | None = None

    def asked(self) -> dict[str, Any]:
        """What was asked for, by the names of the options."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.asked().items())

    def within(self, outer: "Settings | None") -> bool:
        """Whether a transaction that was begun with `outer` is all that this asks for."""
        has = {} if outer is None else outer.asked()
        return all(has.get(name) == value for name, value in self.asked().items())

    @property
    def shapes_begin(self) -> bool:
        """Whether it is too late for a transaction that is open."""
        return (self.isolation, self.read_only, self.deferrable) != (None, None, None)

    def begin_options(self, dialect: str) -> dict[str, Any]:
        """What shapes the BEGIN, as execution options of the engine."""
        options: dict[str, Any] = {}
        if self.isolation is not None and dialect != "sqlite":  # where it has what is asked for anyway
            options["isolation_level"] = self.isolation
        if dialect == "postgresql":
            if self.read_only is not None:
                options["postgresql_readonly"] = self.read_only
            if self.deferrable is not None:
                options["postgresql_deferrable"] = self.deferrable
        return options

    def refuse_unknown(self, dialect: str) -> None:
        """Raise if the database cannot do what is asked for.

        Raises:
            ConfigurationError: it cannot; it is better to know than to go on without.
        """
        if dialect == "postgresql":
            return
        known = {"isolation", "read_only", *(["lock_timeout"] if dialect == "sqlite" else [])}
        for name in self.asked():
            if name not in known:
                raise ConfigurationError(
                    f"{name} of a block is known on PostgreSQL, and {dialect} has none. Leave it out; on {dialect} a "
                    f"block may have {', '.join(sorted(known))}."
                )
        if dialect == "sqlite" and self.isolation in LEVELS[:2]:
            raise ConfigurationError(
                f"SQLite's transactions see one snapshot, and so cannot be {self.isolation}: ask for SERIALIZABLE, "
                "or REPEATABLE READ, or nothing."
            )

    def tell(self, connection: Connection) -> None:
        """Set what does not shape the BEGIN, for the transaction that is open on a connection."""
        dialect = connection.dialect
        if dialect.name == "postgresql":
            limits = {
                server: value for name, (server, _) in _POSTGRESQL.items() if (value := getattr(self, name)) is not None
            }
            version: Any = getattr(dialect, "server_version_info", None) or (0,)
            if self.timeout is not None and version < (17,):
                raise ConfigurationError(
                    f"timeout={self.timeout} was asked for, and PostgreSQL limits whole transactions from version 17 "
                    f"on; this is {version[0]}. Use statement_timeout and idle_timeout."
                )
            if limits:
                set_each = (f"set_config('{name}', '{milliseconds(value)}', true)" for name, value in limits.items())
                connection.exec_driver_sql(f"SELECT {', '.join(set_each)}")
        elif dialect.name == "sqlite":
            if self.read_only:
                sqlite.set_until_returned(connection, "query_only", 1)
            if self.lock_timeout is not None:
                sqlite.set_until_returned(connection, "busy_timeout", milliseconds(self.lock_timeout))

    def explain(self, error: DBAPIError, age: float, whose: object) -> str | None:
        """Which of the time-outs an error came from.

        Args:
            error: what the database said.
            age: how long the transaction had been open, in seconds.
            whose: the block, as errors name it.
        """
        text = str(error.orig)
        code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        name = _BY_CODE.get(code or "")
        by_hand = name == "statement_timeout" and "user request" in text
        if name is None and "database is locked" in text:
            name = "lock_timeout"
        if name is not None and not by_hand and getattr(self, name) is not None:
            return f"This is {name}={getattr(self, name)!r} of {whose}."
        if name is None and error.connection_invalidated:  # not every driver tells the server's last words
            ending = {"idle_timeout": self.idle_timeout, "timeout": self.timeout}
            struck = [f"{name}={value!r}" for name, value in ending.items() if value is not None and value <= age]
            if struck:
                return f"This may be {' or '.join(struck)} of {whose}, after which the server ends the connection."
        return None


def settings_of(options: Any) -> Settings | None:
    """What a block's options ask of the server, checked; None if they ask for nothing.

    Raises:
        ConfigurationError: an option cannot be meant.
    """
    asked = {name: options[name] for name in SettingOptions.__annotations__ if name in options}
    if not asked:
        return None
    for name, value in asked.items():
        if name.endswith("timeout"):
            asked[name] = _seconds(name, value)
        elif name == "isolation":
            if value not in LEVELS:
                raise ConfigurationError(f"isolation is one of {', '.join(map(repr, LEVELS))}, not {value!r}.")
        elif not isinstance(value, bool):
            raise ConfigurationError(f"{name} is True or False, not {value!r}.")
    settings = Settings(**asked)
    if settings.deferrable and not (settings.isolation == "SERIALIZABLE" and settings.read_only):
        raise ConfigurationError(
            "deferrable=True waits for a snapshot that cannot fail, which is known for read-only serializable "
            'transactions alone: add isolation="SERIALIZABLE", read_only=True.'
        )
    return settings


def _seconds(name: str, value: Any) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST:
        raise ConfigurationError(f"{name} is a number of seconds above 0 (24 days at most), or a timedelta: {value!r}.")
    return float(seconds)


def milliseconds(seconds: float) -> int:
    """A time-out as servers take it."""
    return math.ceil(seconds * 1000)  # never 0, which means no limit
