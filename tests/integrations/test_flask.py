"""Flask: a scope for each request, command and application context, and who commits."""

import threading
import warnings
from importlib import metadata
from typing import Any

import pytest
from sqlalchemy import select, text

from dbscope import ConfigurationError, NoScopeError, ScopeEndedError, UncommittedWrites, current_scope, scope
from dbscope.integrations import wsgi
from tests.support import needs
from tests.support.kits import LIMIT, Account, Payment
from tests.support.web import fetch, fetch_together

flask: Any = needs.module("flask", extra="flask")
click: Any = needs.module("click", extra="flask")
scopes: Any = needs.module("dbscope.integrations.flask", extra="flask")


@pytest.fixture
def app():
    """An application without routes."""
    return flask.Flask("shop")


def save(kit, amount=500):
    """Write, and commit nothing."""
    kit.session().add(Payment(amount=amount))
    kit.session().flush()
    return "saved"


def save_the_same_twice(kit):
    """Leave to the commit what cannot be committed."""
    kit.session().add_all([Account(name="same"), Account(name="same")])
    return "saved"


# -- a request ---------------------------------------------------------------------------------------------------------


def test_a_request_is_named_by_its_rule(app):
    """Of a blueprint's routes, too; a request without a route by its path; the application may rename it."""
    names = []
    shop = flask.Blueprint("shop", "shop", url_prefix="/shop")

    @app.get("/orders/<int:id>")
    @shop.post("/orders/<int:id>")
    def order(id):
        names.append(current_scope().name)
        current_scope().name = "an order"
        names.append(current_scope().name)
        return "order"

    @app.errorhandler(404)
    def missing(error):
        names.append(current_scope().name)
        return "missing", 404

    app.register_blueprint(shop)
    scopes.Scopes(app)
    client = app.test_client()
    assert client.get("/orders/7").status_code == 200
    assert client.post("/shop/orders/7").status_code == 200
    assert client.get("/nothing").status_code == 404
    assert client.get("/orders/7", base_url="http://localhost/below").status_code == 200
    assert names == [
        "GET /orders/<int:id>",
        "an order",
        "POST /shop/orders/<int:id>",
        "an order",
        "GET /nothing",
        "GET /below/orders/<int:id>",
        "an order",
    ]


def test_one_scope_from_the_first_to_the_last_function_of_a_request(app, sync_kit):
    """Sessions of functions before, after and at the teardown are the view's; nothing is open when the client reads."""
    seen = []

    def note(*args):
        seen.append((current_scope(), sync_kit.session()))
        sync_kit.session().scalar(text("SELECT 1"))
        return args[0] if args else None

    app.before_request(note)
    app.after_request(note)
    app.teardown_request(lambda error: note() and None)
    app.teardown_appcontext(lambda error: note() and None)
    app.add_url_rule("/", view_func=lambda: note() or "done")
    scopes.Scopes(app)
    response = app.test_client().get("/")
    assert (response.text, len(seen), len(set(seen))) == ("done", 5, 1)
    assert (sync_kit.checked_out(), current_scope()) == (0, None)


def test_by_default_the_application_commits(app, sync_kit):
    """What it did not commit is rolled back and reported."""
    app.add_url_rule("/kept", view_func=lambda: save(sync_kit) and (sync_kit.session().commit() or "kept"))
    app.add_url_rule("/lost", "lost", view_func=lambda: save(sync_kit))
    scopes.Scopes(app)
    client = app.test_client()
    assert client.get("/kept").status_code == 200
    with pytest.warns(UncommittedWrites, match="GET /lost"):
        client.get("/lost")
    assert sync_kit.count() == 1


@pytest.mark.parametrize("installed", ["first", "last"])
def test_the_commit_comes_after_every_after_request_function(app, sync_kit, installed):
    """Whenever they were registered; their writes are committed, too, and the teardown finds them."""
    shop = flask.Blueprint("shop", "shop")
    counts = []

    def late(response):
        counts.append(sync_kit.count())
        save(sync_kit, 2)
        return response

    if installed == "first":
        scopes.Scopes(app, commit="on-success")
    app.after_request(late)
    shop.after_request(late)
    shop.add_url_rule("/", methods=["POST"], view_func=lambda: flask.after_this_request(late) and save(sync_kit, 1))
    app.register_blueprint(shop)
    app.teardown_request(lambda error: counts.append(sync_kit.count()))
    if installed == "last":
        scopes.Scopes(app, commit="on-success")
    assert app.test_client().post("/").text == "saved"
    assert counts == [0, 0, 0, 4]


def test_failures_5_a_failed_commit_is_a_500_of_the_application(app, sync_kit):
    """By its own error handler, and without the view's body."""
    app.add_url_rule("/", methods=["POST"], view_func=lambda: save_the_same_twice(sync_kit))

    @app.errorhandler(500)
    def failed(error):
        return type(error.original_exception).__name__, 500

    scopes.Scopes(app, commit="on-success")
    response = app.test_client().post("/")
    assert (response.status_code, response.text, sync_kit.count(Account)) == (500, "IntegrityError", 0)


def test_a_cookie_that_cannot_be_written_commits_nothing(app, sync_kit):
    """Flask writes its session after the last function, and answers 500 if it cannot."""
    app.secret_key = "secret"

    @app.post("/")
    def unserializable():
        flask.session["object"] = object()
        return save(sync_kit)

    scopes.Scopes(app, commit="on-success")
    assert app.test_client().post("/").status_code == 500
    assert sync_kit.count() == 0


@pytest.mark.parametrize(("veto", "kept"), [(None, [200]), (lambda status: status >= 500, [200, 404])])
def test_the_status_decides(app, sync_kit, veto, kept):
    """Below 400, or as the veto says; what was raised is rolled back."""

    @app.post("/<int:status>")
    def answer(status):
        save(sync_kit, status)
        if status == 500:
            raise ZeroDivisionError
        return "answer", status

    scopes.Scopes(app, commit="on-success", veto=veto)
    for status in (200, 404, 500):
        assert app.test_client().post(f"/{status}").status_code == status
    assert sync_kit.amounts() == kept


def test_an_error_that_propagates_rolls_back(app, sync_kit):
    """As in tests of an application, where Flask raises instead of answering."""
    app.testing = True
    app.add_url_rule("/", view_func=lambda: save(sync_kit) and 1 / 0)
    scopes.Scopes(app, commit="on-success")
    with pytest.raises(ZeroDivisionError):
        app.test_client().get("/")
    assert (sync_kit.count(), sync_kit.checked_out(), current_scope()) == (0, 0, None)


def test_a_teardown_that_fails_leaves_nothing_behind(app, sync_kit):
    """Flask calls no function after one that raises: the scopes do not depend on it."""

    @app.teardown_appcontext
    def fail(error):
        raise ZeroDivisionError

    app.add_url_rule("/", view_func=lambda: str(sync_kit.session().scalar(text("SELECT 1"))))
    scopes.Scopes(app)
    with pytest.raises(ZeroDivisionError):
        app.test_client().get("/")
    assert (sync_kit.checked_out(), current_scope()) == (0, None)
    with pytest.raises(ZeroDivisionError), app.app_context():
        sync_kit.session().scalar(text("SELECT 1"))
    assert (sync_kit.checked_out(), current_scope()) == (0, None)


def test_async_views(app, sync_kit):
    """They run in the request's scope, and are committed with it."""
    needs.module("asgiref", extra="flask")
    scopes.Scopes(app, commit="on-success")

    @app.post("/")
    async def view():
        return f"{save(sync_kit)} in {current_scope().name}"

    assert app.test_client().post("/").text == "saved in POST /"
    assert sync_kit.count() == 1


# -- streams, and other work -------------------------------------------------------------------------------------------


def test_failures_3_a_stream_with_context_opens_a_scope_of_its_own(app, sync_kit):
    """Between its parts it holds no connection, and the request is at hand."""

    def part():
        with sync_kit.db.reader() as session:
            return str(session.scalars(select(Payment.amount)).all())

    @app.post("/")
    def stream():
        save(sync_kit, 7)

        @flask.stream_with_context
        def parts():
            yield flask.request.method
            yield part()

        return parts()

    scopes.Scopes(app, commit="on-success")
    response = app.test_client().post("/")
    held = [(chunk, sync_kit.checked_out()) for chunk in response.iter_encoded()]
    response.close()
    assert held == [(b"POST", 0), (b"[7]", 0)]
    assert current_scope() is None


def test_failures_3_a_stream_that_forgets_its_scope_is_told(app, sync_kit):
    """It does not get a session that nobody would release."""

    @app.get("/")
    def stream():
        return flask.stream_with_context(str(sync_kit.session()) for _ in range(1))

    scopes.Scopes(app)
    with pytest.raises(ScopeEndedError, match="'GET /', which has ended with the start of its response"):
        app.test_client().get("/")
    assert current_scope() is None


def test_a_copied_request_context_has_a_scope_of_its_own_in_another_thread(app, sync_kit):
    """Which ends with it; the request's session stays the request's."""
    found = []

    @app.get("/")
    def view():
        found.append(sync_kit.session())

        @flask.copy_current_request_context
        def work():
            found.extend([sync_kit.session(), flask.request.path])
            sync_kit.session().scalar(text("SELECT 1"))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(LIMIT)
        return str(sync_kit.checked_out())

    scopes.Scopes(app)
    assert app.test_client().get("/").text == "0"
    assert found[1] is not found[0]
    assert found[2] == "/"


# -- application contexts and commands ---------------------------------------------------------------------------------


def test_an_application_context_has_a_scope_of_its_own(app, sync_kit):
    """Inside another, and inside a request; pushed again it is the same work."""
    scopes.Scopes(app, commit="on-success")

    @app.get("/")
    def view():
        outside = sync_kit.session()
        with app.app_context():
            assert sync_kit.session() is not outside
        assert sync_kit.session() is outside
        return "view"

    with app.app_context() as context:
        outer = sync_kit.session()
        assert current_scope().name == "shop's application context"
        with context:
            assert sync_kit.session() is outer
        with scope("inner") as inner:
            with context:
                assert current_scope() is inner
        with app.app_context():
            assert sync_kit.session() is not outer
        assert app.test_client().get("/").text == "view"
        assert sync_kit.session() is outer
        current_scope().name = "a job"
        assert current_scope().name == "a job"
    assert current_scope() is None
    assert app.test_client().get("/").text == "view"


def test_an_application_context_before_the_view_has_a_scope_of_its_own(app, sync_kit):
    """As in a converter that looks something up while the route is found."""
    routing = needs.module("werkzeug.routing", extra="flask")
    sessions = []

    class Known(routing.BaseConverter):
        def to_python(self, value):
            sessions.append(sync_kit.session())
            with app.app_context():
                sessions.append(sync_kit.session())
            return value

    app.url_map.converters["known"] = Known
    app.add_url_rule("/<known:name>", view_func=lambda name: sessions.append(sync_kit.session()) or name)
    scopes.Scopes(app)
    assert app.test_client().get("/tea").text == "tea"
    converter, nested, view = sessions
    assert converter is view
    assert nested is not view


def test_a_request_that_never_reaches_flask_leaves_nothing_behind(app):
    """Because something in between answers: the next application context is not taken for its."""

    def closed(environ, start_response):
        start_response("503 Closed", [("Content-Type", "text/plain")])
        return [b""]

    app.wsgi_app = closed
    scopes.Scopes(app)
    assert app.test_client().get("/").status_code == 503
    with app.app_context():
        assert current_scope().name == "shop's application context"
    assert current_scope() is None


def test_a_request_without_server_is_work_of_its_application_context(app, sync_kit):
    """As tests dispatch one: it is not committed for them, and ends with the context."""
    app.add_url_rule("/", view_func=lambda: current_scope().name)
    scopes.Scopes(app, commit="on-success")
    with app.test_request_context("/"):
        assert app.full_dispatch_request().get_data(as_text=True) == "shop's application context"
        save(sync_kit)
        sync_kit.session().rollback()
    assert (sync_kit.checked_out(), current_scope()) == (0, None)


def test_the_test_client_as_a_context_manager(app, sync_kit):
    """After a request its context is there again, with a scope for the test, until the block ends."""
    scopes.Scopes(app, commit="on-success")
    app.add_url_rule("/", methods=["POST"], view_func=lambda: save(sync_kit))
    with app.test_client() as client:
        for number in (1, 2):
            assert client.post("/").text == "saved"
            assert flask.request.method == "POST"
            assert len(sync_kit.session().scalars(select(Payment)).all()) == number
    assert (sync_kit.checked_out(), current_scope()) == (0, None)


@pytest.mark.parametrize("by", ["flask cmd", "test_cli_runner"])
def test_a_command_has_a_scope(app, sync_kit, by):
    """Named by the command; what it did not commit is reported, unless it failed."""
    scopes.Scopes(app)
    seen = []

    @app.cli.command("book")
    def book():
        seen.append(current_scope())
        seen.append(current_scope().name)
        save(sync_kit)
        sync_kit.session().commit()

    @app.cli.command("leave")
    def leave():
        save(sync_kit)
        click.get_current_context().exit()

    @app.cli.command("fail")
    def fail():
        save(sync_kit)
        raise ZeroDivisionError

    runner = app.test_cli_runner()
    obj = flask.cli.ScriptInfo(create_app=lambda: app, set_debug_flag=False)

    def invoke(name):
        if by == "test_cli_runner":
            return runner.invoke(args=[name])
        return runner.invoke(flask.cli.FlaskGroup(name="flask"), args=[name], obj=obj, prog_name="flask")

    assert invoke("book").exception is None
    assert seen[0].ended
    assert seen[1].endswith("book")
    with pytest.warns(UncommittedWrites, match="nobody committed"):
        assert invoke("leave").exception is None
    with warnings.catch_warnings(record=True) as told:
        assert isinstance(invoke("fail").exception, ZeroDivisionError)
    assert [str(warning.message) for warning in told] == []
    assert (sync_kit.count(), sync_kit.checked_out(), current_scope()) == (1, 0, None)


# -- beside Flask-SQLAlchemy -------------------------------------------------------------------------------------------


def test_beside_flask_sqlalchemy(app, sync_kit, tmp_path):
    """Each keeps its own sessions and its own end of the request."""
    extension = needs.module("flask_sqlalchemy", extra="flask")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'other.db'}"
    other = extension.SQLAlchemy(app)

    class Note(other.Model):
        id = other.Column(other.Integer, primary_key=True)

    scopes.Scopes(app, commit="on-success")

    @app.post("/")
    def view():
        other.session.add(Note())
        other.session.commit()
        assert sync_kit.session() is not other.session()
        return save(sync_kit)

    with app.app_context():
        other.create_all()
    assert app.test_client().post("/").text == "saved"
    with app.app_context():
        assert other.session.scalars(select(Note.id)).all() == [1]
        assert sync_kit.session().scalars(select(Payment.amount)).all() == [500]
        engine = other.engine
    assert engine.pool.checkedout() == 0
    engine.dispose()


# -- a real server -----------------------------------------------------------------------------------------------------


def test_on_the_real_server_with_threads(app, sync_kit):
    """Requests at the same time commit their own work; failures are 500s; a stream reaches the client."""
    serving = needs.module("werkzeug.serving", extra="flask")

    class Quiet(serving.WSGIRequestHandler):
        def log(self, *args):
            """Say nothing."""

    @app.post("/<int:amount>")
    def book(amount):
        if amount == 9:
            return save_the_same_twice(sync_kit)
        return save(sync_kit, amount)

    @app.get("/")
    def stream():
        return flask.stream_with_context(flask.request.method for _ in range(2))

    app.logger.disabled = True
    scopes.Scopes(app, commit="on-success")
    assert sync_kit.db
    server = serving.make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        answers = fetch_together(server.server_port, [f"/{amount}" for amount in range(10)])
        assert fetch(server.server_port) == (200, b"GETGET")
    finally:
        server.shutdown()
        thread.join(LIMIT)
        server.server_close()
    assert [answers[f"/{amount}"][0] for amount in range(10)] == [200] * 9 + [500]
    assert sync_kit.amounts() == list(range(9))


# -- mistakes, at start-up ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [lambda app: scopes.Scopes(app), lambda app: scopes.Scopes().init_app(app)])
def test_installed_twice(app, again):
    """By the extension or the middleware."""
    scopes.Scopes(app)
    wrapped = app.wsgi_app
    app.wsgi_app = lambda environ, start_response: wrapped(environ, start_response)
    with pytest.raises(ConfigurationError, match="has scopes already"):
        again(app)
    other = flask.Flask("other")
    other.wsgi_app = wsgi.ScopeMiddleware(other.wsgi_app)
    with pytest.raises(ConfigurationError, match="has scopes already"):
        again(other)


@pytest.mark.parametrize("options", [{"commit": "always"}, {"veto": bool}, {"commit": "on-success", "veto": 400}])
def test_wrong_options(options):
    """Where they are written, before there is an application."""
    with pytest.raises(ConfigurationError):
        scopes.Scopes(**options)


def test_no_flask_application():
    """Such as its WSGI callable."""
    with pytest.raises(ConfigurationError, match="are given the application"):
        scopes.Scopes(flask.Flask("shop").wsgi_app)


def test_a_flask_that_is_too_old(app, monkeypatch):
    """The error names both versions."""
    monkeypatch.setattr(metadata, "version", lambda name: "2.3.3")
    with pytest.raises(ConfigurationError, match=r"3\.0 or newer, and this is 2\.3\.3"):
        scopes.Scopes(app)


def test_one_extension_for_several_applications(sync_kit):
    """Each has its own requests; the extension need not be kept."""
    extension = scopes.Scopes(commit="on-success")
    apps = [flask.Flask("one"), flask.Flask("two")]
    for app in apps:
        extension.init_app(app)
        app.add_url_rule("/", methods=["POST"], view_func=lambda: save(sync_kit))
    del extension
    assert [app.test_client().post("/").status_code for app in apps] == [200, 200]
    assert sync_kit.count() == 2


def test_an_async_database_needs_an_async_scope(app, tmp_path):
    """In an async view: the request's own could not be awaited, and the error says what to open."""
    needs.module("greenlet", extra="async")
    needs.module("aiosqlite", extra="aiosqlite")
    needs.module("asgiref", extra="flask")
    from dbscope import AsyncDatabase

    app.testing = True
    scopes.Scopes(app)
    db = AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}")
    app.add_url_rule("/refused", "refused", view_func=lambda: db.session())

    @app.get("/opened")
    async def opened():
        async with scope("opened"):
            answer = str(await db.session.scalar(text("SELECT 1")))
        await db.dispose()
        return answer

    with pytest.raises(NoScopeError, match="async with"):
        app.test_client().get("/refused")
    assert app.test_client().get("/opened").text == "1"
