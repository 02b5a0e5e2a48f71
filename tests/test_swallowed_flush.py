"""A flush that failed, and whose error was swallowed, inside of a managed block."""

import pytest
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dbscope import Database


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.filterwarnings("ignore:New instance")
def test_work_after_a_swallowed_flush_error_is_told_of_the_savepoint():
    """SQLAlchemy's advice to roll back would end the owner's transaction: a note gives the advice that holds here."""
    with Database("sqlite://") as db:
        Base.metadata.create_all(db.engine)
        with pytest.raises(PendingRollbackError) as caught:
            with db.transaction() as session:
                session.add(Note(id=1))
                session.flush()
                with pytest.raises(IntegrityError):
                    session.add(Note(id=1))
                    session.flush()
                session.add(Note(id=2))
        _, note = caught.value.__notes__  # the first quotes the failure
        assert "put the part that may fail into `transaction(nested=True)`" in note
        assert "test_swallowed_flush.py" in note
