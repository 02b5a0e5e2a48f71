"""The connection that a session took: its own commit and rollback are no way around the owner of the transaction."""

from typing import Any, NoReturn

from sqlalchemy.engine import Connection
from sqlalchemy.exc import StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from dbscope.aborted import Failure, refuse_aborted
from dbscope.errors import DBScopeError
from dbscope.events import PoolExhausted, emit
from dbscope.interrupt import is_of_signal, swallowed, take_swallowed
from dbscope.lifecycle import Doom, Lifecycle
from dbscope.outcome import commit
from dbscope.where import here

__all__ = ["OwnedConnection"]

_exhausted = PoolExhausted.observers


class OwnedConnection(Connection):
    """A connection of an instrumented engine: once a session took it, its transaction is the session's to end.

    Every commit passes `_commit_impl`, that of the connection's transaction object included. An event would see it too,
    but one listener of that kind costs every statement of the engine a quarter of its time.
    """

    _dbscope: Session | None = None  # which session's statements these are
    _life: Lifecycle | None = None  # who ends the transaction; None: whoever took the connection from the engine
    _hold: Any = None  # what a watch of the engine knows of it
    _failed: Failure | None = None  # the statement that the transaction failed with
    _committing = False  # the COMMIT is under way
    _lost = False  # and the connection was lost meanwhile
    _cut = False  # because the call was cut short, by what the user gets to see

    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            Connection.__init__(self, *args, **options)  # super() would take as long as all else here
        except PoolTimeout as error:
            if _exhausted:
                emit(PoolExhausted(engine=args[0], error=error))
            raise
        except BaseException as error:
            # It was taken from the pool, and cut while it was set up: nobody else will give it back.
            taken = getattr(self, "_dbapi_connection", None)
            if taken is not None and taken.is_valid:
                taken.invalidate(error)
            raise

    def close(self) -> None:
        """Close as `Connection.close`; what a signal's handler raises meanwhile comes out."""
        if swallowed:
            take_swallowed()  # it came out by itself
        taken = getattr(self, "_dbapi_connection", None)  # there is none once it is closed, or invalidated
        try:
            transaction = self._transaction
            if transaction is not None and not (transaction.is_active or self.closed or self.invalidated):
                self._undo()
            Connection.close(self)
        except BaseException as error:
            record = getattr(taken, "_connection_record", None)
            if record is not None and not record.in_use:  # cut while it went back, and the pool would miss it for ever
                record._checkin_failed(error, _fairy_was_created=False)
            raise
        if swallowed and (late := take_swallowed()) is not None:
            raise late

    def _undo(self) -> None:
        """Roll back what failed to commit: SQLAlchemy takes that for ended, and does not.

        SQLite keeps a transaction open whose COMMIT it refused, and any may be open where a signal came before its
        COMMIT was sent: the connection would go back into the pool with all locks.
        """
        try:
            self._rollback_impl()
        except Exception:
            self.invalidate()  # what came first stays on top

    def _handle_dbapi_exception(self, e: BaseException, *args: Any, **options: Any) -> NoReturn:
        try:
            super()._handle_dbapi_exception(e, *args, **options)
        except StatementError:  # before a statement is sent SQLAlchemy wraps whatever is raised
            if not is_of_signal(e):
                raise
        raise e

    def _safe_close_cursor(self, cursor: Any) -> None:
        try:
            cursor.close()
        except Exception as error:
            if is_of_signal(error):
                raise
            self.engine.pool.logger.error("error closing a cursor", exc_info=True)  # as SQLAlchemy's own does

    def commit(self) -> None:
        """Commit as `Connection.commit`; refused in a managed transaction."""
        if self._life is not None:
            self._life.refuse_stranger("session.connection().commit()")
        super().commit()

    def _commit_impl(self) -> None:
        life = self._life
        if life is None:
            super()._commit_impl()
            return
        life.refuse_stranger("a commit of the session's connection")
        life.refuse_sibling("a commit of the session's connection")
        if self.dialect.name == "postgresql":
            refuse_aborted(self, self._failed, life)
        commit(self, life, super()._commit_impl)
        for write in life.writes:
            write.over = True
        life.writes = ()

    def _rollback_to_savepoint_impl(self, name: str) -> None:
        super()._rollback_to_savepoint_impl(name)
        self._failed = None  # the savepoint is older: there is none to be made in an aborted transaction

    def rollback(self) -> None:
        """Roll back as `Connection.rollback`; refused in a managed transaction, which cannot be committed then."""
        life = self._life
        if life is not None:
            try:
                life.refuse_stranger("session.connection().rollback()")
            except DBScopeError:
                if life.doom is None:
                    life.doom = Doom("a rollback of its connection was asked for", here(), None)
                raise
            life.refuse_sibling("session.connection().rollback()")
        super().rollback()
