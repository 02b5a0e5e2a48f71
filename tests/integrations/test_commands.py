"""click and Typer: a scope for each command, named by its path, and what its exit means for the commit."""

import asyncio
import contextlib
import subprocess
import sys
from importlib import metadata
from typing import Annotated, Any

import pytest
from sqlalchemy import text

import dbscope
from dbscope import ConfigurationError, NoScopeError, UncommittedWrites, current_scope, scope
from dbscope.conformance import Conformance, Outcome
from tests.support import needs
from tests.support.gevented import ROOT
from tests.support.kits import LIMIT, Account, Payment


class Click:
    """A click program, whose commands are given by `command`."""

    def __init__(self):
        self.click: Any = needs.module("click", extra="click")
        self.Scopes: Any = needs.module("dbscope.integrations.click", extra="click").Scopes
        from click.testing import CliRunner

        self.app = self.click.Group("shop")
        self.runner = CliRunner()
        self.Exit = self.click.exceptions.Exit

    def command(self, function, to=None):
        """Add a function as a command."""
        (to or self.app).command()(function)
        return function

    def callback(self, function):
        """Make a function that of the program itself."""
        self.app.callback = function

    def group(self, name):
        """Add a group."""
        group = self.click.Group(name)
        self.app.add_command(group)
        return group

    def add(self, name, function):
        """Add a function as the command of a name."""
        self.app.add_command(self.click.Command(name, callback=function))

    def call(self, *args):
        """Run the program as another program would: it raises what its command did."""
        self.app.main(list(args), prog_name="shop", standalone_mode=False)

    def run(self, *args):
        """The result of the program."""
        return self.runner.invoke(self.app, args)


class Typer:
    """A Typer program, in the same way."""

    def __init__(self):
        self.click: Any = needs.module("typer", extra="typer")
        self.Scopes: Any = needs.module("dbscope.integrations.typer", extra="typer").Scopes
        from typer.testing import CliRunner

        self.app = self.click.Typer(name="shop", add_completion=False)
        self.runner = CliRunner()
        self.Exit = self.click.Exit

    def command(self, function, to=None):
        """Add a function as a command."""
        assert (to or self.app).command()(function) is function
        return function

    def callback(self, function):
        """Make a function that of the program itself."""
        self.app.callback()(function)

    def group(self, name):
        """Add a program to the program."""
        group = self.click.Typer()
        self.app.add_typer(group, name=name)
        return group

    def add(self, name, function):
        """Add a function as the command of a name."""
        self.app.command(name)(function)

    def call(self, *args):
        """Run the program as another program would: it raises what its command did."""
        self.click.main.get_command(self.app).main(list(args), prog_name="shop", standalone_mode=False)

    def run(self, *args):
        """The result of the program."""
        return self.runner.invoke(self.app, list(args), prog_name="shop")


@pytest.fixture(params=[Click, Typer], ids=["click", "typer"])
def program(request):
    """A program of each kind, without scopes yet."""
    return request.param()


def succeeded(result):
    """A result, of which its error is raised."""
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0
    return result


def test_each_command_has_a_scope_named_by_its_path(program, sync_kit):
    """Of the commands that were there, that came later, and of groups, which may come later, too."""
    names, sessions = [], []

    def note():
        names.append(current_scope().name)
        sessions.append(sync_kit.session())

    def first():
        note()

    def second():
        note()

    def listed():
        note()

    def early():
        note()

    before = program.group("before")
    program.command(first)
    program.command(early, before)
    program.Scopes(program.app)
    after = program.group("after")
    program.command(second)
    program.command(listed, after)
    for args in (["first"], ["second"], ["before", "early"], ["after", "listed"]):
        succeeded(program.run(*args))
    assert names == ["shop first", "shop second", "shop before early", "shop after listed"]
    assert len({id(session) for session in sessions}) == 4
    assert current_scope() is None


def test_a_program_of_one_command(sync_kit):
    """Typer makes no group of it, and click need not have one."""
    names = []
    for program in (Click(), Typer()):

        def only():
            names.append(current_scope().name)

        if isinstance(program, Typer):
            program.command(only)
        else:
            program.app = program.click.command("shop")(only)
        program.Scopes(program.app)
        succeeded(program.run())
    assert names == ["shop", "shop"]


def test_by_default_the_command_commits(program, sync_kit):
    """A scope never does; what the command forgot is reported, in the line of its write."""

    def keep():
        sync_kit.session().add(Payment(amount=1))
        sync_kit.session().commit()

    def forget():
        sync_kit.session().add(Payment(amount=2))
        sync_kit.session().flush()

    program.command(keep)
    program.command(forget)
    program.Scopes(program.app)
    succeeded(program.run("keep"))
    result = program.run("forget")
    assert isinstance(result.exception, UncommittedWrites)
    assert "scope 'shop forget'" in str(result.exception)
    assert "test_commands.py" in str(result.exception)
    assert sync_kit.amounts() == [1]
    assert sync_kit.checked_out() == 0


def ends(program):
    """How a command may end: its name, how, the exit code, and whether it is success."""
    click = program.click
    return {
        "returns": (lambda: 7, 0, True),
        "exits": (lambda: leave(program.Exit(0)), 0, True),
        "exits with 3": (lambda: leave(program.Exit(3)), 3, False),
        "sys.exit()": (lambda: sys.exit(), 0, True),
        "sys.exit(0)": (lambda: sys.exit(0), 0, True),
        "sys.exit(4)": (lambda: sys.exit(4), 4, False),
        "sys.exit(text)": (lambda: sys.exit("no"), 1, False),
        "aborts": (lambda: leave(click.Abort()), 1, False),
        "complains": (lambda: leave(click.BadParameter("no")), 2, False),
        "is interrupted": (lambda: leave(KeyboardInterrupt()), (1, 130), False),
        "raises": (lambda: leave(KeyError("no")), 1, False),
    }


def leave(error):
    """Raise an error, in a lambda."""
    raise error


@pytest.mark.parametrize(
    "ending",
    [
        *("returns", "exits", "exits with 3", "sys.exit()", "sys.exit(0)", "sys.exit(4)", "sys.exit(text)"),
        *("aborts", "complains", "is interrupted", "raises"),
    ],
)
def test_what_an_exit_means_for_the_commit(program, sync_kit, ending):
    """On success: a return, `ctx.exit()` and `sys.exit()` without a code or with 0; all else rolls back. The exit code
    is the command's own."""
    end, code, success = ends(program)[ending]

    def pay():
        sync_kit.session().add(Payment())
        return end()

    program.command(pay)
    program.callback(lambda: None)
    program.Scopes(program.app, commit="on-success")
    result = program.run("pay")
    assert result.exit_code in (code if isinstance(code, tuple) else (code,))
    assert sync_kit.count() == success
    assert sync_kit.checked_out() == 0


@pytest.mark.parametrize("leaves", [False, True], ids=["returns", "exits"])
def test_a_failing_commit_is_a_failing_command(program, sync_kit, leaves):
    """Nobody is told by the exit code that it succeeded, `ctx.exit()` or not."""

    def clash():
        sync_kit.session().add_all([Account(name="same"), Account(name="same")])
        if leaves:
            raise program.Exit(0)

    program.command(clash)
    program.callback(lambda: None)
    program.Scopes(program.app, commit="on-success")
    result = program.run("clash")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "IntegrityError"
    assert sync_kit.count(Account) == 0
    assert sync_kit.checked_out() == 0


def test_the_program_itself_is_a_piece_of_work(program, sync_kit):
    """The function of a group has a scope of its own, which has ended when its command begins."""
    seen = []

    def setup():
        sync_kit.session().add(Payment(amount=1))
        seen.append(current_scope())

    def command():
        assert seen[0].ended
        seen.append(current_scope())

    program.callback(setup)
    program.command(command)
    program.Scopes(program.app, commit="on-success")
    succeeded(program.run("command"))
    assert [work.name for work in seen] == ["shop", "shop command"]
    assert sync_kit.amounts() == [1]


def test_a_command_that_calls_another_does_so_in_its_scope(sync_kit):
    """`ctx.invoke()` is a call: what both did is committed, or undone, together."""
    program = Click()
    seen = []

    def inner():
        sync_kit.session().add(Payment(amount=1))
        seen.append(current_scope())

    def outer():
        sync_kit.session().add(Payment(amount=2))
        seen.append(current_scope())
        program.click.get_current_context().invoke(program.app.commands["inner"])
        raise program.Exit(1)

    program.command(inner)
    program.command(outer)
    program.Scopes(program.app, commit="on-success")
    succeeded(program.run("inner"))  # from now on its function is wrapped
    assert program.run("outer").exit_code == 1
    assert seen[1] is seen[2]
    assert sync_kit.amounts() == [1]


def test_commands_in_a_chain_have_a_scope_each(sync_kit):
    """Each command of a chain is committed when it is through."""
    program = Click()
    program.app = program.click.Group("shop", chain=True)

    def first():
        sync_kit.session().add(Payment(amount=1))

    def second():
        sync_kit.session().add(Payment(amount=2))
        raise program.Exit(1)

    program.command(first)
    program.command(second)
    program.Scopes(program.app, commit="on-success")
    assert program.run("first", "second").exit_code == 1
    assert sync_kit.amounts() == [1]


def test_commands_that_are_loaded_when_they_are_called(sync_kit):
    """Groups that find their commands by `get_command()`, as click's documentation shows, and collections of groups."""
    program = Click()
    names = []

    class Lazy(program.click.Group):
        def get_command(self, ctx, name):
            return program.click.Command(name, callback=lambda: names.append(current_scope().name))

    program.app = Lazy("shop")
    program.Scopes(program.app)
    succeeded(program.run("found"))
    program.app = program.click.CommandCollection("all", sources=[Lazy("other")])
    program.Scopes(program.app)
    succeeded(program.run("found"))
    assert names == ["shop found", "all found"]


def test_a_commands_parameters_stay_its_own(sync_kit):
    """Signatures, annotations and contexts are read from the plain function."""
    program = Typer()
    seen = []

    def pay(amount: Annotated[int, program.click.Argument()], twice: bool = False):
        """Pay an amount."""
        seen.append((amount, twice))

    program.command(pay)
    program.Scopes(program.app)
    succeeded(program.run("7", "--twice"))
    assert seen == [(7, True)]
    assert "Pay an amount." in program.run("--help").output
    other = Click()

    @other.app.command()
    @other.click.argument("amount", type=int)
    @other.click.pass_context
    def pay_in_context(ctx, amount):
        seen.append((ctx.command_path, amount))

    other.Scopes(other.app)
    succeeded(other.run("pay-in-context", "8"))
    assert seen[1] == ("shop pay-in-context", 8)


def test_an_async_database_wants_its_own_scope(program, sync_kit, tmp_path):
    """A command is sync: in what it awaits `async with scope()` is needed, and the error says so."""
    needs.module("greenlet", extra="async")
    needs.module("aiosqlite", extra="aiosqlite")
    adb = dbscope.AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'other.db'}")
    errors, answers = [], []

    async def main():
        try:
            adb.session()
        except NoScopeError as error:
            errors.append(str(error))
        async with scope("import"):
            answers.append(await adb.session.scalar(text("SELECT 42")))
        await adb.dispose()

    def work():
        asyncio.run(main())

    program.command(work)
    program.callback(lambda: None)
    program.Scopes(program.app)
    succeeded(program.run("work"))
    assert "scope 'shop work'" in errors[0]
    assert "async with scope():" in errors[0]
    assert answers == [42]


def test_a_scope_around_a_runner_is_apart(program, sync_kit):
    """In a test that has a scope of its own the command does not work in that."""
    sessions = []

    def work():
        sessions.append(sync_kit.session())

    program.command(work)
    program.callback(lambda: None)
    program.Scopes(program.app)
    with scope("test") as test:
        mine = sync_kit.session()
        succeeded(program.run("work"))
        assert current_scope() is test
    assert sessions[0] is not mine


class TestClickConforms(Conformance):
    """Commands of click's, called in threads."""

    scope_name = "shop {}"
    not_applicable = {"veto": "a command has no status but its exit", "streams": "a command writes as it goes"}
    kind: type[Click] | type[Typer] = Click

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        program = self.kind()
        for name, handler in handlers.items():
            program.add(name, handler)
        program.callback(lambda: None)
        program.Scopes(program.app, commit=commit)

        def send(name):
            try:
                program.call(name)
            except BaseException as error:
                return Outcome(ok=False, error=error)
            return Outcome(ok=True)

        yield send


class TestTyperConforms(TestClickConforms):
    """Commands of Typer's, in the same way."""

    kind = Typer


# -- start-up ----------------------------------------------------------------------------------------------------------


def test_bad_input(program, monkeypatch):
    """One clear error each, where the program is put together."""
    with pytest.raises(ConfigurationError, match=r"are given the program|are given its command or group"):
        program.Scopes(lambda: None)
    with pytest.raises(ConfigurationError, match='commit is None or "on-success"'):
        program.Scopes(program.app, commit=True)
    program.Scopes(program.app)
    with pytest.raises(ConfigurationError, match="has scopes already"):
        program.Scopes(program.app)
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.1")
    with pytest.raises(ConfigurationError, match=r"scopes need (click 8\.1|typer 0\.12) or newer, and this is 0\.9\.1"):
        program.Scopes(type(program)().app)


def test_the_other_kind_of_program_is_told_where_to_go():
    """A Typer program is not click's."""
    with pytest.raises(ConfigurationError, match=r"For Typer use dbscope\.integrations\.typer"):
        Click().Scopes(Typer().app)


@pytest.mark.parametrize("name", ["click", "typer"])
def test_a_missing_framework_is_one_error(name):
    """It names the extra."""
    program = (
        f"import sys; sys.modules['{name}'] = None\n"
        f"try:\n    import dbscope.integrations.{name}\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT, cwd=ROOT)
    assert f'pip install "dbscope[{name}]"' in done.stdout


PROGRAM = """
import sys
import {kind}
from sqlalchemy import text
from dbscope import Database, current_scope
from dbscope.integrations.{kind} import Scopes

db = Database(sys.argv.pop(1))
{app}
Scopes(shop, commit="on-success")

@shop.command()
def init():
    db.session.execute(text("CREATE TABLE orders (id INTEGER PRIMARY KEY)"))

@shop.command()
def order():
    db.session.execute(text("INSERT INTO orders DEFAULT VALUES"))
    print(current_scope().name)

@shop.command()
def refuse():
    db.session.execute(text("INSERT INTO orders DEFAULT VALUES"))
    raise {kind}.{exit}(5)

@shop.command()
def count():
    print(db.session.scalar(text("SELECT count(*) FROM orders")))

if __name__ == "__main__":
    shop()
"""


@pytest.mark.parametrize(
    ("kind", "app", "exit"),
    [
        ("click", "@click.group()\ndef shop(): ...", "exceptions.Exit"),
        ("typer", "shop = typer.Typer(add_completion=False)", "Exit"),
    ],
)
def test_a_real_program(kind, app, exit, tmp_path):
    """As its user runs it: names, exit codes, and what is there for the next command."""
    needs.module(kind, extra=kind)
    (tmp_path / "shop.py").write_text(PROGRAM.format(kind=kind, app=app, exit=exit))

    def run(command):
        done = subprocess.run(
            [sys.executable, "-W", "ignore::ResourceWarning", "shop.py", "sqlite:///shop.db", command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.strip()

    assert run("init") == (0, "")
    assert run("order") == (0, "shop.py order")
    assert run("refuse") == (5, "")
    assert run("count") == (0, "1")
