"""A table, engines that count what is checked out, and threads."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

T = TypeVar("T")


class Base(DeclarativeBase):
    pass


class Payment(Base):
    __tablename__ = "payments"

    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int] = mapped_column(default=500)


@pytest.fixture
def engine(tmp_path) -> Iterator[Engine]:
    """An engine over a SQLite file with the table; nothing may be checked out when the test is over."""
    engine = create_engine(f"sqlite:///{tmp_path}/payments.sqlite", pool_size=15)
    Base.metadata.create_all(engine)
    yield engine
    held = engine.pool.checkedout()
    engine.dispose()
    assert held == 0


@pytest.fixture
def factory(engine: Engine) -> "sessionmaker[Session]":
    """A factory of sessions of that engine."""
    return sessionmaker(engine)


def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in a thread of its own, to its end."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function, *args).result()
