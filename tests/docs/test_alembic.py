"""The page on Alembic: exactly its env.py runs real migrations, on SQLite and PostgreSQL, in both colours."""

import asyncio
import io
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

from tests.support import needs
from tests.support.kits import Base, Kit, Payment, make_kit

alembic = needs.module("alembic", extra="test")
command: Any = needs.module("alembic.command", extra="test")
config: Any = needs.module("alembic.config", extra="test")

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "alembic.md"
ENVIRONMENTS = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
MIGRATION = """
from alembic import op
import sqlalchemy as sa

revision, down_revision = {revision!r}, {down!r}

def upgrade():
    {upgrade}

def downgrade():
    {downgrade}
"""
ADD = 'op.add_column("payments", sa.Column("note", sa.String))'
DROP = 'op.drop_column("payments", "note")'


class Project:
    """An application with a database, and a folder of migrations with the page's env.py."""

    def __init__(self, kit: Kit, folder: Path) -> None:
        self.kit = kit
        self.folder = folder
        (folder / "versions").mkdir(parents=True)
        (folder / "env.py").write_text(ENVIRONMENTS[kit.colour == "async"], encoding="utf-8")
        self.output = io.StringIO()
        self.config = config.Config(output_buffer=self.output, stdout=io.StringIO())
        self.config.set_main_option("script_location", str(folder))
        self.config.set_main_option("path_separator", "os")
        self.last: str | None = None

    def migration(self, revision: str, upgrade: str, downgrade: str = "pass") -> None:
        """Write the next migration."""
        source = MIGRATION.format(revision=revision, down=self.last, upgrade=upgrade, downgrade=downgrade)
        (self.folder / "versions" / f"{revision}.py").write_text(source, encoding="utf-8")
        self.last = revision

    def run(self, test: Callable[[], Any]) -> None:
        """Run a test with the application's databases, which are disposed of after it."""
        self.kit.run(test())

    async def call(self, function: Callable[..., None], *args: Any, **options: Any) -> None:
        """A command of Alembic's: in this thread, or in another one where a loop runs in this."""
        if self.kit.colour == "async":
            await asyncio.to_thread(function, self.config, *args, **options)
        else:
            function(self.config, *args, **options)

    def columns(self) -> set[str]:
        """The columns of the payments."""
        return {column["name"] for column in inspect(self.kit.outside).get_columns("payments")}

    def version(self) -> str | None:
        """The migration that the database stands at."""
        with self.kit.outside.connect() as connection:
            return connection.scalar(text("SELECT version_num FROM alembic_version"))


@pytest.fixture(params=["sync", "async"])
def colour(request: pytest.FixtureRequest) -> Any:
    """The colour of the application's database."""
    return request.param


@pytest.fixture(params=["sqlite", "postgresql"])
def project(request: pytest.FixtureRequest, colour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project on each kind of database."""
    on_server = request.param == "postgresql"
    url = request.getfixturevalue("postgres_url") if on_server else f"sqlite:///{tmp_path / 'test.db'}"
    return prepared(make_kit(colour, url), tmp_path, monkeypatch)


@pytest.fixture
def server_project(colour: str, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project on PostgreSQL."""
    return prepared(make_kit(colour, postgres_url), tmp_path, monkeypatch)


def prepared(kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose application has a pool of one."""
    shop = types.ModuleType("shop")
    vars(shop).update(Base=Base, db=kit.database(pool_size=1, max_overflow=0))
    monkeypatch.setitem(sys.modules, "shop", shop)
    return Project(kit, folder / "migrations")


def test_alembic_the_page_has_one_environment_for_each_colour() -> None:
    """Both are programs, and differ where the databases differ, and nowhere else."""
    sync, twin = ENVIRONMENTS
    compile(sync, "env.py", "exec")
    compile(twin, "env.py", "exec")
    shared = re.compile(r"^def migrate.*?(?=^(?:async )?def |^if )|^def print_sql.*?(?=^if )", re.MULTILINE | re.DOTALL)
    assert shared.findall(sync) == shared.findall(twin)
    assert len(shared.findall(sync)) == 2


def test_alembic_migrates_up_and_down(project: Project) -> None:
    """Each migration is carried out and committed, while the application holds its one connection."""

    async def test() -> None:
        project.migration("one", ADD, "with op.batch_alter_table('payments') as batch: batch.drop_column('note')")
        project.migration("two", 'op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True))')
        kit = project.kit
        async with kit.scope("GET /orders"):
            await kit.done(kit.session().execute(text("SELECT * FROM accounts")))
            await project.call(command.upgrade, "head")
        assert project.version() == "two"
        assert "note" in project.columns()
        await project.call(command.downgrade, "base")
        assert "note" not in project.columns()

    project.run(test)


def test_alembic_a_migration_that_fails_is_undone_and_those_before_it_stay(project: Project) -> None:
    """Each migration is a transaction of its own, DDL on SQLite included."""

    async def test() -> None:
        project.migration("one", ADD)
        project.migration("two", 'op.add_column("payments", sa.Column("half", sa.String)); op.execute("SELEKT")')
        with pytest.raises(DBAPIError):
            await project.call(command.upgrade, "head")
        assert project.version() == "one"
        assert project.columns() == {"id", "amount", "account_id", "note"}

    project.run(test)


def test_alembic_prints_sql_without_a_connection(project: Project) -> None:
    """`--sql` writes the statements and connects to nothing."""

    async def test() -> None:
        project.migration("one", ADD)
        await project.call(command.upgrade, "head", sql=True)
        printed = project.output.getvalue()
        assert "ALTER TABLE payments ADD COLUMN note VARCHAR" in printed
        assert "INSERT INTO alembic_version (version_num) VALUES ('one')" in printed
        assert "note" not in project.columns()

    project.run(test)


def test_alembic_finds_what_the_models_have_changed(project: Project) -> None:
    """`revision --autogenerate` compares with the application's own metadata."""

    async def test() -> None:
        project.migration("one", ADD)
        await project.call(command.upgrade, "head")
        script = Path(alembic.__file__).parent / "templates" / "generic" / "script.py.mako"
        (project.folder / "script.py.mako").write_text(script.read_text())
        await project.call(command.revision, "the note goes", autogenerate=True)
        (made,) = (project.folder / "versions").glob("*the_note_goes.py")
        assert "drop_column('note')" in made.read_text().replace("'payments', ", "")

    project.run(test)


def test_alembic_a_table_that_is_made_anew_keeps_what_refers_to_it(project: Project) -> None:
    """SQLite changes a table by dropping it: what refers to it, and would go with it, stays."""

    async def test() -> None:
        kit = project.kit
        cascade = 'sa.ForeignKey("payments.id", ondelete="CASCADE")'
        project.migration("one", f'op.create_table("notes", sa.Column("payment_id", sa.Integer, {cascade}))')
        change = 'with op.batch_alter_table("payments") as batch: batch.alter_column("amount", type_=sa.BigInteger)'
        project.migration("two", change)
        await project.call(command.upgrade, "one")
        async with kit.transaction() as session:
            session.add(Payment(id=1))
            await kit.done(session.flush())
            await kit.done(session.execute(text("INSERT INTO notes VALUES (1)")))
        await project.call(command.upgrade, "head")
        with kit.outside.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM notes")) == 1

    project.run(test)


def test_alembic_runs_with_limits_and_a_name_of_its_own(server_project: Project) -> None:
    """The server knows the migration by its name, and lets it wait five seconds for a lock, and no longer."""

    async def test() -> None:
        project = server_project
        wanted = "'dbscope: migration' || '5s'"
        found = "current_setting('application_name') || current_setting('lock_timeout')"
        project.migration("one", f'op.execute("SELECT 1 / (CASE {found} WHEN {wanted} THEN 1 ELSE 0 END)")')
        await project.call(command.upgrade, "head")
        assert project.version() == "one"

    server_project.run(test)


def test_failures_31_alembic_names_who_holds_the_table(project: Project) -> None:
    """An idle transaction of the application's has the table: nothing hangs, and the error names scope and line."""

    async def test() -> None:
        kit = project.kit
        # The page's five seconds, which nobody needs to wait for here.
        environment = project.folder / "env.py"
        environment.write_text(environment.read_text().replace("lock_timeout=5)", "lock_timeout=1)"))
        assert "lock_timeout=1)" in environment.read_text()
        project.migration("one", ADD)
        async with kit.scope("GET /orders"):
            await kit.done(kit.session().execute(text("UPDATE payments SET amount = 0")))
            with pytest.raises(DBAPIError, match="lock") as raised:
                await project.call(command.upgrade, "head")
            await kit.done(kit.session().rollback())
            (note,) = raised.value.__notes__
            if kit.url.get_backend_name() == "postgresql":
                assert "It waited for payments (AccessExclusiveLock), held by:" in note
                assert "its last statement: 'UPDATE payments SET amount = 0'" in note
            assert "scope 'GET /orders'" in note
            assert "taken at tests/docs/test_alembic.py:" in note
            assert "note" not in project.columns()
            await project.call(command.upgrade, "head")
        assert "note" in project.columns()

    project.run(test)
