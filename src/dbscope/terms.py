"""What a block asks for: its kind, as Spring names them, which errors roll it back, and what the server is told."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias, get_args

from dbscope.errors import ConfigurationError
from dbscope.settings import SettingOptions, Settings, settings_of

__all__ = [
    *("AUTOCOMMIT_READER", "DEFAULT", "READER", "Errors", "Kind", "KindName", "Resolution", "Terms"),
    "TransactionOptions",
    *("refuse_resolution", "terms_of"),
]

KindName = Literal["required", "requires-new", "nested", "mandatory", "supports", "not-supported", "never"]
Errors: TypeAlias = type[Exception] | tuple[type[Exception], ...]

# What is done where a connection is lost during COMMIT: raise that the outcome is unknown, or find out before.
Resolution: TypeAlias = Literal["raise", "resolve"]


class Kind(Enum):
    """What a block does where a managed transaction is open already, and where none is."""

    REQUIRED = "required"  # joins it; begins one
    NEW = "requires-new"  # begins one beside it; begins one
    NESTED = "nested"  # a savepoint in it; begins one
    MANDATORY = "mandatory"  # joins it; refuses
    SUPPORTS = "supports"  # joins it; works without one
    NOT_SUPPORTED = "not-supported"  # works beside it without one, both times
    NEVER = "never"  # refuses; works without one
    READER = "reader"  # reads beside it, both times


# These have a transaction of their own to end, if only where they are the outermost.
_BEGIN = frozenset({Kind.REQUIRED, Kind.NEW, Kind.NESTED})


class TransactionOptions(SettingOptions, total=False):
    """The options of `transaction()` and `transactional()`; see there."""

    kind: KindName
    nested: bool
    new: bool
    durable: bool
    rollback_for: Errors
    no_rollback_for: Errors
    outcome: Resolution


@dataclass(frozen=True, slots=True)
class Terms:
    """The options of one block, checked."""

    kind: Kind = Kind.REQUIRED
    durable: bool = False
    rollback_for: tuple[type[Exception], ...] = ()
    no_rollback_for: tuple[type[Exception], ...] = ()
    outcome: Resolution | None = None  # as the database says
    settings: Settings | None = None  # what the server is told
    autocommit: bool = False  # of a reader: each statement is a transaction

    def failure(self, error: BaseException | None) -> BaseException | None:
        """The error, if it is one that undoes the block's work.

        The rule that names the nearest of the error's classes decides, as in Spring; without one, every error does.
        """
        if self.no_rollback_for and error is not None:
            for cls in type(error).__mro__:
                if cls in self.rollback_for:
                    return error
                if cls in self.no_rollback_for:
                    return None
        return error


READER = Terms(Kind.READER)
AUTOCOMMIT_READER = Terms(Kind.READER, autocommit=True)
DEFAULT = Terms()


def refuse_resolution(given: Resolution) -> None:
    """Raise if a user's `outcome=` is none."""
    if given not in get_args(Resolution):
        raise ConfigurationError(f'outcome is "raise" or "resolve", not {given!r}.')


def terms_of(options: TransactionOptions) -> Terms:
    """The checked options of a block.

    Raises:
        ConfigurationError: an option is unknown, or two of them contradict each other.
    """
    if not options:
        return DEFAULT
    known = TransactionOptions.__annotations__
    for name in options:
        if name not in known:
            raise ConfigurationError(f"transaction() has no option {name!r}; it has {', '.join(known)}.")
    kind = _kind_of(options)
    durable = bool(options.get("durable", False))
    if durable and kind not in _BEGIN - {Kind.NESTED}:
        raise ConfigurationError(
            f"durable=True promises that the work is saved when the block ends, which kind={kind.value!r} cannot."
        )
    rollback_for = _errors(options, "rollback_for")
    no_rollback_for = _errors(options, "no_rollback_for")
    both = [error.__name__ for error in rollback_for if error in no_rollback_for]
    if both:
        raise ConfigurationError(f"{both[0]} is in both rollback_for and no_rollback_for: choose.")
    outcome = options.get("outcome")
    if outcome is not None:
        refuse_resolution(outcome)
    settings = settings_of(options)
    if settings is not None and kind not in _BEGIN | {Kind.MANDATORY}:
        raise ConfigurationError(
            f"{settings} is asked of a transaction, and a block of kind={kind.value!r} may work without one."
        )
    return Terms(kind, durable, rollback_for, no_rollback_for, outcome, settings)


def _kind_of(options: TransactionOptions) -> Kind:
    """What the kind and the two switches mean together."""
    asked = []
    if "kind" in options:
        asked.append(_kind_named(options["kind"]))
    asked += [kind for name, kind in (("nested", Kind.NESTED), ("new", Kind.NEW)) if options.get(name)]
    if len(set(asked)) > 1:
        raise ConfigurationError(
            f"{' and '.join(repr(kind.value) for kind in asked)} were asked for together: nested=True is a savepoint "
            "in the open transaction, new=True one beside it. Choose one kind."
        )
    return asked[0] if asked else Kind.REQUIRED


def _kind_named(name: Any) -> Kind:
    for kind in Kind:
        if kind.value == name and kind is not Kind.READER:
            return kind
    names = ", ".join(repr(kind.value) for kind in Kind if kind is not Kind.READER)
    raise ConfigurationError(f"kind is one of {names}, not {name!r}.")


def _errors(
    options: TransactionOptions, name: Literal["rollback_for", "no_rollback_for"]
) -> tuple[type[Exception], ...]:
    given: Any = options.get(name, ())
    errors = given if isinstance(given, tuple) else (given,)
    for error in errors:
        if not (isinstance(error, type) and issubclass(error, Exception)):
            raise ConfigurationError(
                f"{name} takes a class of exceptions, or a tuple of them, not {error!r}. What is no Exception (a "
                "cancel, an interrupt) always rolls back."
            )
    return errors
