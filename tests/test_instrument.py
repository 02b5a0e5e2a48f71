"""What is listened to, where, and how often."""

import gc

import pytest
from sqlalchemy import create_engine, event, text

from dbscope import Database, NotTheOwnerError, UncommittedWrites, scope
from dbscope.instrument import before_statement
from tests.support.kits import Kit, Payment, twice


@pytest.fixture
def quick_collections():
    """Collections look at what was made since alone: the suite has so many objects that they would take minutes."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_an_engine_with_the_id_of_one_that_is_gone_is_watched(quick_collections):
    """Each new engine's statements are seen, also where an engine before it had the same address in memory."""

    addresses, dialects = set(), []
    again = False
    while not again:
        engine = create_engine("sqlite://")
        again = id(engine) in addresses
        addresses.add(id(engine))
        dialects.append(engine.dialect)  # where the listeners are: it may outlive its engine
        with Database(engine) as db, pytest.warns(UncommittedWrites):
            with scope():
                db.session.execute(text("CREATE TABLE payments (id int)"))
        del engine, db
        gc.collect()


def test_two_databases_on_one_engine_see_each_statement_once():
    """However many databases share an engine, or a copy of it with other options, a statement is looked at once."""
    engine = create_engine("sqlite://")
    Database(engine)
    Database(engine.execution_options(isolation_level="SERIALIZABLE"))
    Database(engine)
    assert [*engine.dialect.dispatch.do_execute].count(before_statement) == 1
    assert event.contains(engine, "do_execute", before_statement)


@twice
async def test_every_way_to_execute_is_watched(kit: Kit) -> None:
    """Executions with parameters, without, with many sets of them, and by the driver's own text are all seen."""
    async with kit.transaction() as session:
        connection = await kit.done(session.connection())
        for call in (
            lambda: connection.exec_driver_sql("COMMIT"),
            lambda: connection.exec_driver_sql("COMMIT", (), execution_options={"no_parameters": True}),
            lambda: connection.exec_driver_sql("COMMIT", [(), ()]),
        ):
            with pytest.raises(NotTheOwnerError):
                await kit.done(call())
        session.add_all([Payment(amount=1), Payment(amount=2)])
    assert kit.amounts() == [1, 2]
