"""`db.session`: finds the current scope's session, and stands for it.

A drop-in for SQLAlchemy's `scoped_session`: it is one (so `isinstance`, `event.listen` and what builds on them keep
working), but looks into the current scope instead of a dictionary, and hands out the session's own bound methods
instead of forwarding each call, which is what makes it faster than the original.
"""

import contextlib
from collections.abc import Callable
from functools import update_wrapper
from inspect import Signature, iscoroutinefunction, isfunction, signature
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from dbscope.errors import DBScopeError
from dbscope.implicit import _thread, implicit_scope, open_implicit
from dbscope.lifecycle import End, end_life, life_of
from dbscope.scope import _get
from dbscope.session import refuse_copy, release
from dbscope.where import here, running_loop

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, TableClause
    from sqlalchemy.orm import SessionTransaction

__all__ = ["SessionRegistry"]

S = TypeVar("S", bound=Session)
R = TypeVar("R")


class LookUp(Protocol):
    """`db.session.registry`: a function, for speed, with the methods of SQLAlchemy's `ScopedRegistry`."""

    has: Callable[[], bool]
    set: Callable[[Any], None]
    clear: Callable[[], None]
    place: Callable[[], Any]
    session: Callable[..., Any]

    def __call__(self) -> Any: ...


def look_up(source: Any) -> LookUp:
    """A function that returns the current scope's session for `source`, and makes it where there is none yet.

    It takes and ignores the registry, so that it can stand on the registry's class.
    """
    get = _get
    thread = _thread

    def registry(_registry: Any = None) -> Any:
        home = get()
        if home is not None:
            try:
                return home._sessions[source]
            except KeyError:
                pass  # what `open` raises is not to have this as its context
            return home.open(source)
        if running_loop() is None:
            home = thread.home
            if home is not None:
                try:
                    return home._sessions[source]
                except KeyError:
                    pass
        return outside().open(source)

    def outside() -> Any:
        source.refuse_implicit()
        return open_implicit(source)

    def place() -> Any:
        """The scope that a session is looked for in."""
        home = get()
        return outside() if home is None else home

    def found() -> Any:
        home = get()
        return implicit_scope() if home is None else home

    def has() -> bool:
        home = found()
        return home is not None and home.has(source)

    def put(session: Any) -> None:
        home = place()
        home.put(source, source.accept(session, home))

    def clear() -> None:
        home = found()
        if home is not None:
            home.forget(source)

    def session(**kw: Any) -> Any:
        """As `registry`, with options for the session where it is made by this very call."""
        if kw:
            if has():
                raise InvalidRequestError("Scoped session is already present; no new arguments may be specified.")
            return place().open(source, kw)
        # As in `registry`: one call more takes a third longer.
        home = get()
        if home is None and running_loop() is None:
            home = thread.home
        if home is not None:
            try:
                return home._sessions[source]
            except KeyError:
                pass
        return registry()

    vars(registry).update(has=has, set=put, clear=clear, place=place, session=session)
    return registry  # type: ignore[return-value]  # now it is


class SessionRegistry(scoped_session[S]):
    """The current scope's session: call it for the `Session` itself, or use it as if it were one.

    Every public member of the session can be read here, `in_transaction`, `get_transaction`, `invalidate` and others
    that `scoped_session` lacks included.
    """

    registry: Any

    if TYPE_CHECKING:  # the members that `stand_for` adds below
        autobegin: bool
        expire_on_commit: bool
        hash_key: int
        join_transaction_mode: str
        twophase: bool

        def bind_mapper(self, mapper: Any, bind: Engine | Connection) -> None: ...
        def bind_table(self, table: TableClause, bind: Engine | Connection) -> None: ...
        def enable_relationship_loading(self, obj: object) -> None: ...
        def get_nested_transaction(self) -> SessionTransaction | None: ...
        def get_transaction(self) -> SessionTransaction | None: ...
        def in_nested_transaction(self) -> bool: ...
        def in_transaction(self) -> bool: ...
        def invalidate(self) -> None: ...
        def prepare(self) -> None: ...

    def __init__(self, source: Any, factory: "sessionmaker[S]") -> None:
        self.session_factory = factory
        self._source = source
        be_a_dependency(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_copy(repr(self))

    def __call__(self, **kw: Any) -> S:
        """The current scope's session, made now if there is none yet.

        Args:
            kw: options for the session, where it is made by this very call.

        Raises:
            InvalidRequestError: options were given and the session is there already.
            ScopeEndedError: the current scope is over.
            NoScopeError: no scope is open, and none may be opened implicitly.
        """
        return self.registry.session(**kw)  # type: ignore[no-any-return]  # an S; a database's own class is faster

    def remove(self) -> None:
        """End the current scope's session, if there is one; the next call makes a new one.

        In a managed transaction it waits for the owner's end, as `Session.close()` does.

        Raises:
            OverlapError: another thread or task is using the session; it stays.
            Exception: what closing raised; the session is gone all the same.
        """
        registry = self.registry
        if not registry.has():
            return
        session = registry()
        if waits_for_owner(session):
            return
        try:
            session.close()
        except DBScopeError:
            raise  # refused: nothing has happened
        except BaseException:
            forget(self, session)
            with contextlib.suppress(Exception):  # what closing raised stays on top
                release(session)
            raise
        forget(self, session)
        release(session)

    def __repr__(self) -> str:
        return f"<the session of {self._source.name} in the current scope>"


def be_a_dependency(registry: Any) -> None:
    """Let frameworks that inject what a callable gives take the registry for a coroutine function without parameters.

    As it stands in `Depends(db.session)`: FastAPI would take the options of `__call__` for a query parameter, and make
    the call in a worker thread. What it finds on the object, calling it does not: `db.session()` is the class's. That
    gives a session, which a framework may await, as it is no mistake to await one (see `ScopedSession`).
    """

    async def dependency() -> Any:
        return registry.registry.session()

    registry.__call__ = dependency
    registry.__signature__ = Signature(return_annotation=registry.session_factory.class_)


def waits_for_owner(session: Any) -> bool:
    """Whether the end of a session has to wait for a managed transaction's; it is then kept in mind."""
    life = life_of(session)
    waits = life.owner is not None and not life.acting
    if waits:
        life.close_waits = True
    return waits


def forget(registry: Any, session: Any) -> None:
    """Take a session that was closed out of its scope, and make it dead."""
    home = life_of(session).home
    registry.registry.clear()
    end_life(session, End(home.describe() if home else registry._source.name, here(), how="it was removed"))


# Every member is generated with the look-up written out in it: calling `registry()` and `getattr` from a common getter
# would make it slower than SQLAlchemy's own proxy, which is generated too. No scope, or no session yet: the long way.
_LOOK_UP = """
    home = _get()
    if home is None:
        session = self.registry()
    else:
        try:
            session = home._sessions[self._source]
        except KeyError:
            session = None
        if session is None:  # not in the `except`, which tracebacks of what is raised there would show first
            session = home.open(self._source)
"""
_ATTRIBUTE = f"""
def get(self):{_LOOK_UP}    return session.{{name}}

def set_(self, value):{_LOOK_UP}    session.{{name}} = value
"""
_METHOD = f"""
def method(self, {{parameters}}):{_LOOK_UP}    return session.{{name}}({{parameters}})
"""
# For registries of another kind, which find their session by themselves.
_FOUND_BY_REGISTRY = """
    session = self.registry()
"""


def _generate(template: str, **names: str) -> dict[str, Any]:
    # Under this module's name, so that errors do not take it for the user's line; and under that of no file, of which
    # tracebacks would quote a line that has nothing to do with it.
    made: dict[str, Any] = {"_get": _get, "__name__": __name__}
    exec(compile(template.format(**names), f"{__file__} (generated)", "exec"), made)
    return made


def _member(session_class: type, name: str, proxy: Any = None, *, find: str = _LOOK_UP) -> Any:
    """A registry's member that stands for the session's: a method where one can, else a property.

    Args:
        session_class: the session's.
        name: the member's.
        proxy: SQLAlchemy's own member of a registry, if it has one: what cannot be set there cannot be set here.
        find: how to find the session.
    """
    original = _raw(session_class, name)
    parameters = _plain_parameters(original)
    if parameters is not None and find is _LOOK_UP:
        method = _generate(_METHOD, name=name, parameters=", ".join(parameters))["method"]
        return update_wrapper(method, original)
    made = _generate(_ATTRIBUTE.replace(_LOOK_UP, find), name=name)
    read_only = isinstance(proxy, property) and proxy.fset is None
    return property(made["get"], None if read_only else made["set_"], doc=getattr(original, "__doc__", None))


def _plain_parameters(original: Any) -> list[str] | None:
    """The parameters of a method that has no options; None for others, and for what is no method.

    A method with options stays a property, which yields the session's own bound method: passing on a dozen options
    that nobody gave would take longer, and a default would be written down twice.
    """
    if not isfunction(original) or iscoroutinefunction(original):
        return None
    _, *parameters = signature(original).parameters.values()
    public = [p for p in parameters if not p.name.startswith("_")]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in public):
        return None
    return [p.name for p in public]


def stand_for(registry_class: type, session_class: type) -> None:
    """Give a registry every public member of the session class: each look-up yields the session's own.

    What SQLAlchemy's registry has beside the session's members (`configure`, `query_property`, the class methods)
    stays as it is, and what cannot be set there cannot be set here.
    """
    for name in _members(session_class):
        if name not in registry_class.__dict__:
            setattr(registry_class, name, _member(session_class, name, getattr(registry_class, name, None)))
    for name in ("__contains__", "__iter__"):
        setattr(registry_class, name, _forward(name))


def complete(registry_class: type, session_class: type) -> None:
    """Give a registry the public members of the session class that it lacks."""
    for name in _members(session_class):
        if not hasattr(registry_class, name):
            setattr(registry_class, name, _member(session_class, name, find=_FOUND_BY_REGISTRY))


def registry_for(registry_class: type[R], source: Any, session_class: type, plain: type) -> type[R]:
    """The registry's class for a database: with its look-up, and what its session class adds to the `plain` one.

    Such as the `exec` of SQLModel's. The look-up is on a class of the database's own, because Python calls methods
    faster than what an instance keeps; a `__getattr__` would slow down every member.
    """
    own = {
        name: _member(session_class, name)
        for name in dir(session_class)
        if not name.startswith("_") and name != "dispatch" and _raw(session_class, name) is not _raw(plain, name)
    }
    return type(registry_class.__name__, (registry_class,), own | _look_ups(source))


def registry_beside(registry: R, source: Any, factory: Any) -> R:
    """A registry like another one, for a database beside that one's."""
    cls: Any = type(registry)
    made: R = type(cls.__name__, (cls,), _look_ups(source))(source, factory)
    return made


def _look_ups(source: Any) -> dict[str, Any]:
    """What a database's registry is asked for most: a static function, which is called without the registry."""
    registry = look_up(source)
    return {"registry": registry, "__call__": staticmethod(registry.session)}


# Set by `__init__`, and so unknown to the class.
_OF_SESSION = (
    *("autobegin", "autoflush", "bind", "enable_baked_queries", "expire_on_commit", "hash_key", "identity_map"),
    *("join_transaction_mode", "twophase"),
)
_OF_ASYNC_SESSION = ("sync_session",)


def _members(session_class: type) -> list[str]:
    names = [*dir(session_class), *(_OF_SESSION if issubclass(session_class, Session) else _OF_ASYNC_SESSION)]
    return [
        name for name in names if not name.startswith("_") and not isinstance(_raw(session_class, name), classmethod)
    ]


def _raw(cls: type, name: str) -> Any:
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return getattr(self.registry(), name)(*args)

    method.__name__ = name
    return method


stand_for(SessionRegistry, Session)
