"""Kinds of blocks, and what a block may say of its own end: DESIGN's Transactions 1 and 2, as Spring defines them."""

from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from dbscope import (
    NoTransactionError,
    NotTheOwnerError,
    ReadOnlyError,
    RollbackOnlyError,
    TransactionInProgress,
    UncommittedWrites,
    current_scope,
)
from tests.support.kits import Kit, Payment, twice

PLAIN = ["supports", "not-supported", "never"]


def write(amount: int) -> Any:
    """An INSERT that goes to the database at once."""
    return insert(Payment).values(amount=amount)


# -- kinds -------------------------------------------------------------------------------------------------------------


@twice
async def test_transactions_1_mandatory_joins_and_never_begins(kit: Kit) -> None:
    """`mandatory` works in the open transaction; where there is none, it is refused before anything happens."""
    async with kit.scope():
        with pytest.raises(NoTransactionError, match=r'"mandatory" was entered at .*[.]py:[0-9]+'):
            async with kit.transaction(kind="mandatory"):
                pytest.fail("entered")
    with pytest.raises(ReadOnlyError):
        async with kit.reader(), kit.transaction(kind="mandatory"):
            pytest.fail("entered")
    with pytest.raises(NoTransactionError):
        async with kit.transaction(kind="mandatory"):
            pytest.fail("entered")
    assert current_scope() is None
    async with kit.transaction() as outer:
        async with kit.transaction(kind="mandatory") as session:
            assert session is outer
            session.add(Payment(amount=1))
        assert kit.amounts() == []
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_mandatory_finds_an_on_success_scope(kit: Kit) -> None:
    """A scope that commits on success is a transaction, whether or not it has begun."""
    async with kit.scope(commit="on-success"):
        async with kit.transaction(kind="mandatory") as session:
            session.add(Payment(amount=1))
    assert kit.amounts() == [1]


@pytest.mark.parametrize("kind", ["never", "durable"])
@twice
async def test_transactions_1_what_must_be_outermost_refuses_to_be_inside(kit: Kit, kind: str) -> None:
    """`never`, and `durable=True`, are refused in a transaction and in an on-success scope, naming who began it."""
    options: Any = {"durable": True} if kind == "durable" else {"kind": kind}
    for around in (kit.transaction(), kit.scope(commit="on-success"), kit.transaction(kind="required")):
        async with around:
            with pytest.raises(TransactionInProgress, match=r"inside the transaction .*begun at .*[.]py:[0-9]+"):
                async with kit.transaction(**options):
                    pytest.fail("entered")
            async with kit.transaction() as session:  # which was not harmed
                session.add(Payment(amount=1))
    assert kit.amounts() == [1, 1, 1]


@twice
async def test_transactions_1_durable_saves_what_is_outermost(kit: Kit) -> None:
    """`durable=True` begins and commits, in a plain scope and outside of any, and beside a transaction with `new`."""
    async with kit.transaction(durable=True) as session:
        session.add(Payment(amount=1))
    async with kit.scope():
        async with kit.transaction(durable=True) as session:
            session.add(Payment(amount=2))
        assert kit.amounts() == [1, 2]


@twice
async def test_transactions_1_a_durable_independent_one_is_saved_beside_the_outer(server_kit: Kit) -> None:
    """An independent transaction is as durable inside of another as outside."""
    kit = server_kit
    with pytest.raises(KeyError):
        async with kit.transaction() as session:
            await kit.done(session.execute(write(1)))
            async with kit.transaction(new=True, durable=True) as session:
                await kit.done(session.execute(write(2)))
            raise KeyError
    assert kit.amounts() == [2]


@pytest.mark.parametrize("kind", PLAIN)
@twice
async def test_transactions_1_plain_kinds_without_a_transaction(kit: Kit, kind: Any) -> None:
    """Where none is open they begin none: the session is the user's, who commits, or is told of what is lost."""
    async with kit.transaction(kind=kind) as session:
        await kit.done(session.execute(write(1)))
        await kit.done(session.commit())
    assert kit.amounts() == [1]
    assert current_scope() is None
    with pytest.warns(UncommittedWrites, match=r"test_kinds.py:\d+"):
        async with kit.transaction(kind=kind) as session:
            await kit.done(session.execute(write(2)))
    assert kit.amounts() == [1]
    assert kit.checked_out() == 0


@pytest.mark.parametrize("kind", PLAIN)
@twice
async def test_transactions_1_plain_kinds_in_a_plain_scope(kit: Kit, kind: Any) -> None:
    """In a plain scope they work with its session, and leave what it holds to the scope."""
    async with kit.scope():
        mine = kit.session()
        async with kit.transaction(kind=kind) as session:
            assert session is mine
            await kit.done(session.execute(write(1)))
        assert kit.checked_out() == 1
        await kit.done(mine.commit())
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_supports_joins(kit: Kit) -> None:
    """`supports` in a transaction is a part of it: its error dooms, its work goes with the whole."""
    with pytest.raises(RollbackOnlyError, match="a block in it failed with KeyError"):
        async with kit.transaction() as outer:
            with pytest.raises(KeyError):
                async with kit.transaction(kind="supports") as session:
                    assert session is outer
                    raise KeyError
    assert kit.amounts() == []
    async with kit.reader() as outer, kit.transaction(kind="supports") as session:
        assert session is outer


@twice
async def test_transactions_1_not_supported_works_beside_the_transaction(server_kit: Kit) -> None:
    """`not-supported` leaves the open transaction alone: a session of its own, whose commit is its user's."""
    kit = server_kit
    with pytest.raises(KeyError):
        async with kit.transaction() as outer:
            await kit.done(outer.execute(write(1)))
            async with kit.transaction(kind="not-supported") as session:
                assert session is not outer
                await kit.done(session.execute(write(2)))
                await kit.done(session.commit())
            assert kit.session() is outer
            raise KeyError
    assert kit.amounts() == [2]


# -- which errors roll back --------------------------------------------------------------------------------------------


@twice
async def test_transactions_1_an_error_that_does_not_roll_back(kit: Kit) -> None:
    """After an error of `no_rollback_for` the work is committed, and the error comes out as it was."""
    failure = KeyError("told")
    with pytest.raises(KeyError) as caught:
        async with kit.transaction(no_rollback_for=LookupError) as session:
            session.add(Payment(amount=1))
            raise failure
    assert caught.value is failure
    with pytest.raises(KeyError):
        async with kit.scope(), kit.transaction(no_rollback_for=LookupError, rollback_for=KeyError) as session:
            session.add(Payment(amount=2))
            raise failure
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_in_a_joined_block_it_does_not_doom_the_outer(kit: Kit) -> None:
    """The rule of the block that the error leaves counts: a joined one's lets the outer commit, if it handles it."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        with pytest.raises(KeyError):
            async with kit.transaction(no_rollback_for=KeyError):
                raise KeyError
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_in_a_savepoint_it_keeps_the_savepoint(kit: Kit) -> None:
    """A nested block that an expected error leaves is kept, and one that another leaves is undone."""
    async with kit.transaction():
        for amount, error in ((1, KeyError), (2, ValueError)):
            with pytest.raises(error):
                async with kit.transaction(nested=True, no_rollback_for=KeyError) as session:
                    session.add(Payment(amount=amount))
                    raise error
    assert kit.amounts() == [1]


@twice
async def test_transactions_1_a_commit_that_fails_after_an_expected_error_is_what_comes_out(kit: Kit) -> None:
    """Who handles the expected error believes that the work is saved: a failed commit must not hide behind it."""
    async with kit.transaction() as session:
        session.add(Payment(id=1))
    with pytest.raises(IntegrityError) as caught:
        async with kit.transaction(no_rollback_for=KeyError) as session:
            session.add(Payment(id=1))
            raise KeyError("expected")
    assert isinstance(caught.value.__context__, KeyError)
    assert kit.checked_out() == 0


# -- from inside -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["block", "block in a scope", "on-success scope", "requires-new"])
@twice
async def test_transactions_2_a_block_may_roll_itself_back(kit: Kit, where: str) -> None:
    """`set_rollback_only()` by the one who began: the work goes on, is rolled back at the end, and nobody raises."""
    seen: list[str] = []
    outer = kit.scope(commit="on-success" if where == "on-success scope" else None)
    async with outer:
        inner = kit.scope() if where == "on-success scope" else kit.transaction(new=where == "requires-new")
        if where == "on-success scope":
            session = kit.session()
            await kit.done(session.execute(write(1)))
            kit.db.on_rollback(seen.append, "rolled back")
            kit.db.set_rollback_only()
            await kit.done(session.execute(write(2)))
        else:
            async with inner as session:
                await kit.done(session.execute(write(1)))
                kit.db.on_rollback(seen.append, "rolled back")
                kit.db.set_rollback_only()
                await kit.done(session.execute(write(2)))
            assert seen == ["rolled back"]
    assert seen == ["rolled back"]
    assert kit.amounts() == []
    async with kit.transaction() as session:  # it was that one transaction's
        session.add(Payment(amount=3))
    assert kit.amounts() == [3]


@twice
async def test_transactions_2_a_savepoint_may_roll_itself_back(kit: Kit) -> None:
    """In a nested block `set_rollback_only()` undoes that savepoint alone, without an error."""
    async with kit.transaction() as session:
        session.add(Payment(amount=1))
        async with kit.transaction(nested=True) as session:
            session.add(Payment(amount=2))
            await kit.done(session.flush())
            kit.db.set_rollback_only()
        session.add(Payment(amount=3))
    assert kit.amounts() == [1, 3]


@twice
async def test_transactions_2_a_joined_block_cannot_undo_the_outer_in_silence(kit: Kit) -> None:
    """Asked for in a block that joined, the outer one is told that its work is not saved: it would believe it is."""
    with pytest.raises(RollbackOnlyError, match=r"set_rollback_only\(\) was called .* at .*test_kinds.py"):
        async with kit.transaction() as session:
            session.add(Payment(amount=1))
            async with kit.transaction():
                kit.db.set_rollback_only()
    assert kit.amounts() == []
    async with kit.transaction() as session:
        session.add(Payment(amount=2))
        with pytest.raises(RollbackOnlyError):
            async with kit.transaction(nested=True):
                async with kit.transaction():
                    kit.db.set_rollback_only()
    assert kit.amounts() == [2]


@pytest.mark.parametrize("where", ["block", "joined", "nested", "on-success scope"])
@twice
async def test_transactions_2_a_doomed_transaction_is_never_committed(kit: Kit, where: str) -> None:
    """`doom()` refuses what follows and the commit of the whole transaction, with its reason and line."""
    with pytest.raises(RollbackOnlyError, match=r"it was doomed \(the books do not balance\) at .*test_kinds.py"):
        async with kit.scope(commit="on-success") if where == "on-success scope" else kit.transaction():
            await kit.done(kit.session().execute(write(1)))
            if where in ("joined", "nested"):
                with pytest.raises(RollbackOnlyError) if where == "nested" else _nothing():
                    async with kit.transaction(nested=where == "nested"):
                        kit.db.doom("the books do not balance")
            else:
                kit.db.doom("the books do not balance")
            with pytest.raises(RollbackOnlyError):
                await kit.done(kit.session().execute(write(2)))
    assert kit.amounts() == []
    assert kit.checked_out() == 0


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("call", ["set_rollback_only", "doom"])
@twice
async def test_transactions_2_there_must_be_a_transaction_to_roll_back(kit: Kit, call: str) -> None:
    """Outside of a managed transaction, and in a reader, both say that there is none, and what to do."""

    def ask() -> None:
        with pytest.raises(NoTransactionError, match=r"at .*test_kinds.py.*\n.*session.rollback\(\)"):
            kit.db.doom("why") if call == "doom" else kit.db.set_rollback_only()

    ask()
    async with kit.scope():
        ask()
        kit.session()
        ask()
    async with kit.reader():
        ask()


@twice
async def test_transactions_2_what_only_the_owner_may_do_stays_so(kit: Kit) -> None:
    """Marking a transaction gives nobody its commit."""
    async with kit.transaction() as session:
        await kit.done(session.execute(write(1)))
        kit.db.set_rollback_only()
        with pytest.raises(NotTheOwnerError):
            await kit.done(session.commit())
    assert kit.amounts() == []
