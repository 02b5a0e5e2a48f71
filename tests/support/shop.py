"""A small application, as the examples of the documentation use it: give `write` the folder of a user's tests."""

from pathlib import Path

SHOP = """
import asyncio
from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from dbscope import Database

class Base(DeclarativeBase):
    pass

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]

engine = create_engine("sqlite:///shop.db")
Base.metadata.create_all(engine)
engine.dispose()
db = Database("sqlite:///shop.db")
sent = []

def send_receipt(item):
    sent.append(item)

@db.transactional
def place_order(item):
    db.session.add(Order(item=item))
    db.on_commit(send_receipt, item)

def count_orders():
    with db.reader() as session:
        return session.scalar(select(func.count()).select_from(Order))
"""

ASYNC = """
from dbscope import AsyncDatabase
adb = AsyncDatabase("sqlite+aiosqlite:///shop.db")

@adb.transactional
async def aplace_order(item):
    adb.session.add(Order(item=item))

async def acount_orders():
    async with adb.reader() as session:
        return await session.scalar(select(func.count()).select_from(Order))
"""


def write(folder: Path, *, is_async: bool = False) -> None:
    """Write `shop.py` into a folder; with async twins of its functions if the drivers for them are installed."""
    (folder / "shop.py").write_text(SHOP + (ASYNC if is_async else ""))
