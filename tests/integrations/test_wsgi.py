"""The WSGI middleware: PEP 3333 on both sides, streams as they come, real servers."""

import io
import sys
import threading
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from sqlalchemy import select

from dbscope import NoScopeError, ScopeEndedError, current_scope, scope
from dbscope.integrations.wsgi import ScopeMiddleware
from tests.support import needs
from tests.support.kits import LIMIT, Account, Payment
from tests.support.web import (
    WsgiServer,
    call_wsgi,
    environ,
    fetch,
    fetch_together,
    serve_waitress,
    serve_wsgiref,
)

HEADERS = (("Content-Type", "text/plain"),)  # servers add to the list that they are given
SERVERS = pytest.mark.parametrize("serve", [serve_wsgiref, serve_waitress], ids=["wsgiref", "waitress"])


def exchange(app, **options):
    """A server that has handed a request to the application, and the body it was given."""
    server = WsgiServer()
    return server, ScopeMiddleware(app, **options)(environ("POST"), server.start_response)


def writing(kit, *amounts):
    """Add payments to the current scope's session."""
    kit.session().add_all(Payment(amount=amount) for amount in amounts)
    kit.session().flush()


# -- when the response starts ------------------------------------------------------------------------------------------


def test_start_response_before_the_body_is_not_the_end(sync_kit):
    """An application may begin its response first and then work: its work ends when it has returned."""

    def app(environ, start_response):
        start_response("200 OK", [*HEADERS])
        writing(sync_kit, 1)
        return [b"x"]

    server, body = exchange(app, commit="on-success")
    assert (body, server.told, sync_kit.count(), sync_kit.checked_out()) == ([b"x"], "200 OK", 1, 0)


def test_the_server_hears_of_the_response_when_the_work_is_done(sync_kit):
    """Nothing the server does at `start_response` comes before the commit."""
    order, headers = [], [*HEADERS]

    def app(environ, start_response):
        writing(sync_kit, 1)
        start_response("200 OK", headers)
        return [b"x"]

    def start_response(status, told, exc_info=None):
        order.append((status, told is headers, exc_info, sync_kit.count(), sync_kit.checked_out()))

    ScopeMiddleware(app, "on-success")(environ("POST"), start_response)
    assert order == [("200 OK", True, None, 1, 0)]


def test_start_response_during_the_body(sync_kit):
    """A generator works in its scope up to its first chunk; later chunks are a stream, outside of it."""

    def app(environ, start_response):
        writing(sync_kit, 1)
        start_response("200 OK", [*HEADERS])
        writing(sync_kit, 2)
        yield b"1"
        with pytest.raises(ScopeEndedError):
            sync_kit.session()
        yield b"2"

    server, body = exchange(app, commit="on-success")
    assert (server.told, current_scope()) == (None, None)
    assert next(body) == b"1"
    assert (server.told, sync_kit.amounts(), sync_kit.checked_out(), current_scope()) == ("200 OK", [1, 2], 0, None)
    assert list(body) == [b"2"]
    body.close()


def test_a_body_without_chunks_starts_the_response_at_its_end(sync_kit):
    """As for a redirect: the work is committed, the server is told, and nothing is sent."""

    def app(environ, start_response):
        writing(sync_kit, 1)
        start_response("302 Found", [*HEADERS])
        yield from ()

    answer = call_wsgi(ScopeMiddleware(app, "on-success"), environ("POST"))
    assert (answer.status, answer.chunks, answer.error, sync_kit.count()) == (302, [], None, 1)


def test_an_iterable_may_begin_its_response_when_it_is_iterated(sync_kit):
    """PEP 3333's application as a class: nothing happens before `__iter__`, which runs in the request's scope."""

    class App:
        def __init__(self, environ, start_response):
            self.start_response = start_response

        def __iter__(self):
            writing(sync_kit, 1)
            self.start_response("200 OK", [*HEADERS])
            return iter([b"1", b"2"])

    answer = call_wsgi(validator(ScopeMiddleware(validator(App), "on-success")), environ("POST"))
    assert (answer.status, answer.chunks, answer.error, sync_kit.count()) == (200, [b"1", b"2"], None, 1)


def test_the_write_callable_starts_the_response(sync_kit):
    """`write()` finishes the work before its data leaves, and goes straight to the server."""

    def app(environ, start_response):
        write = start_response("200 OK", [*HEADERS])
        writing(sync_kit, 1)
        write(b"1")
        assert (server.answer.chunks, sync_kit.count(), sync_kit.checked_out()) == ([b"1"], 1, 0)
        with pytest.raises(ScopeEndedError):
            sync_kit.session()
        write(b"2")
        return [b"3"]

    server = WsgiServer()
    answer = server.run(validator(ScopeMiddleware(validator(app), "on-success")), environ("POST"))
    assert (answer.status, answer.chunks, answer.error) == (200, [b"1", b"2", b"3"], None)


def test_write_before_start_response_is_an_error():
    """And so it is after a commit has failed: what the application began is not sent."""

    def app(environ, start_response):
        response.append(start_response)
        return [b""]

    response = []
    _, body = exchange(app)
    with pytest.raises(AssertionError, match=r"start_response\(\) comes first"):
        response[0].__self__.write(b"x")
    body.close()


def test_failures_5_an_application_that_hides_the_failed_commit_sends_nothing(sync_kit):
    """It goes on writing: there is no response to write, and the server answers 500."""

    def app(environ, start_response):
        write = start_response("200 OK", [*HEADERS])
        sync_kit.session().add_all([Account(name="same"), Account(name="same")])
        for _ in range(2):
            try:
                write(b"saved")
            except Exception as error:
                errors.append(error)
        return [b"saved"]

    errors = []
    answer = call_wsgi(ScopeMiddleware(app, "on-success"), environ("POST"))
    assert "UNIQUE" in str(errors[0])
    assert isinstance(errors[1], AssertionError)
    assert (answer.status, answer.chunks, sync_kit.count(Account)) == (500, [], 0)


def test_failures_5_an_application_may_answer_the_failed_commit(sync_kit):
    """By `start_response` with `exc_info`, as PEP 3333 has it for errors."""

    def app(environ, start_response):
        write = start_response("200 OK", [*HEADERS])
        sync_kit.session().add_all([Account(name="same"), Account(name="same")])
        try:
            write(b"saved")
        except Exception:
            start_response("409 Conflict", [*HEADERS], sys.exc_info())
        return [b"no"]

    answer = call_wsgi(ScopeMiddleware(app, "on-success"), environ("POST"))
    assert (answer.status, answer.chunks, sync_kit.count(Account)) == (409, [b"no"], 0)


# -- start_response, called again --------------------------------------------------------------------------------------


def test_an_error_replaces_the_headers_before_they_leave(sync_kit):
    """The status that counts, for the commit too, is the last one."""

    def app(environ, start_response):
        start_response("200 OK", [*HEADERS])
        writing(sync_kit, 1)
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            start_response("500 Oops", [*HEADERS], sys.exc_info())
        return [b"oops"]

    answer = call_wsgi(validator(ScopeMiddleware(validator(app), "on-success")), environ("POST"))
    assert (answer.status, answer.chunks, answer.error, sync_kit.count()) == (500, [b"oops"], None, 0)


def test_an_error_after_the_headers_have_left_is_raised():
    """By the server's own `start_response`, as PEP 3333 has it."""

    def app(environ, start_response):
        start_response("200 OK", [*HEADERS])
        yield b"1"
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            start_response("500 Oops", [*HEADERS], sys.exc_info())

    answer = call_wsgi(ScopeMiddleware(app), environ())
    assert (answer.status, answer.chunks, type(answer.error)) == (200, [b"1"], ZeroDivisionError)


@pytest.mark.parametrize("written", [False, True])
def test_a_second_start_without_an_error_is_refused(written):
    """Before the server is told by the middleware, afterwards by the server."""

    def app(environ, start_response):
        write = start_response("200 OK", [*HEADERS])
        if written:
            write(b"1")
        start_response("201 Created", [*HEADERS])
        return []

    answer = call_wsgi(ScopeMiddleware(app), environ())
    assert isinstance(answer.error, AssertionError)
    assert current_scope() is None


def test_an_error_of_the_server_about_the_headers_reaches_the_server():
    """What its `start_response` raises comes out of the middleware, and the application's body is closed."""
    body = Closing([])

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", None)])
        return body

    def start_response(status, headers, exc_info=None):
        raise ValueError(headers)

    with pytest.raises(ValueError, match="Content-Type"):
        ScopeMiddleware(app)(environ(), start_response)
    assert (body.closed, current_scope()) == (1, None)


# -- the body ----------------------------------------------------------------------------------------------------------


class Closing:
    """A body that counts how often it is closed."""

    def __init__(self, chunks, error=None):
        self.chunks = iter(chunks)
        self.error = error
        self.closed = 0
        self.seen = None

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.chunks)

    def close(self):
        self.closed += 1
        self.seen = current_scope()
        if self.error is not None:
            raise self.error


def answering(body):
    """An application that answers with this body."""

    def app(environ, start_response):
        start_response("200 OK", [*HEADERS])
        return body

    return app


@pytest.mark.parametrize("body", [[b"x"], [], (b"1", b"2"), io.BytesIO(b"x"), FileWrapper(io.BytesIO(b"x"))])
def test_a_body_that_runs_no_code_is_handed_on(body):
    """Servers look at the length of a list, and send a file their own way: they get the very same object."""
    server = WsgiServer()
    request = environ() | {"wsgi.file_wrapper": FileWrapper}
    assert ScopeMiddleware(answering(body))(request, server.start_response) is body


def test_a_file_wrapper_that_is_a_function_is_handed_on():
    """As uWSGI has it: it gives the file back, and knows it again."""
    request = environ() | {"wsgi.file_wrapper": lambda file, size=8192: file}

    def app(environ, start_response):
        start_response("200 OK", [*HEADERS])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"x"))

    assert isinstance(ScopeMiddleware(app)(request, WsgiServer().start_response), io.BytesIO)


def test_each_chunk_leaves_when_it_is_there():
    """The next one is not asked for before the server wants it, empty ones included."""
    made = []

    def app(environ, start_response):
        start_response("200 OK", [*HEADERS])
        for chunk in (b"", b"1", b"", b"2"):
            made.append(chunk)
            yield chunk

    _, body = exchange(app)
    assert made == []
    for number in range(1, 5):
        assert next(body) == made[-1]
        assert len(made) == number
    assert next(body, None) is None


@pytest.mark.parametrize("read", [0, 1, 3])
def test_close_reaches_the_body_once(sync_kit, read):
    """However far the client has read, and although a server calls it twice; it runs as a part of the request."""
    body = Closing([b"1", b"2"])
    _, outer = exchange(answering(body))
    for _ in range(read):
        next(outer, None)
    outer.close()
    outer.close()
    assert body.closed == 1
    with pytest.raises(ScopeEndedError):
        raise body.seen or ScopeEndedError  # an ended scope counts as none, and is not outside of every scope


def test_a_body_that_cannot_be_closed_need_not_be():
    """`close()` is optional in PEP 3333."""
    _, outer = exchange(answering(iter([b"1"])))
    assert list(outer) == [b"1"]
    outer.close()


def test_an_error_of_close_reaches_the_server(sync_kit):
    """And the request's work is over all the same."""

    class Unstarted(Closing):
        def __next__(self):
            writing(sync_kit, 1)
            return b"x"

    body = Unstarted([], error=ZeroDivisionError())
    _, outer = exchange(lambda environ, start_response: body, commit="on-success")
    assert next(outer) == b"x"
    assert sync_kit.checked_out() == 1
    with pytest.raises(ZeroDivisionError):
        outer.close()
    assert (sync_kit.checked_out(), sync_kit.count()) == (0, 0)


def test_the_body_is_closed_when_the_commit_fails(sync_kit):
    """The server never sees it, so the middleware closes it; what that raises is a note on the first error."""

    def app(environ, start_response):
        start_response("200 OK", [*HEADERS])
        sync_kit.session().add_all([Account(name="same"), Account(name="same")])
        return body

    body = Closing([b"x"], error=ZeroDivisionError())
    with pytest.raises(Exception, match="UNIQUE") as failed:
        exchange(app, commit="on-success")
    assert body.closed == 1
    assert "closing the response failed" in failed.value.__notes__[-1]


def test_a_client_that_disconnects_before_the_response(sync_kit):
    """The server closes the body without iterating it: no response, so nothing is committed."""

    def app(environ, start_response):
        writing(sync_kit, 1)
        return Closing([b"x"])

    _, body = exchange(app, commit="on-success")
    assert (sync_kit.checked_out(), current_scope()) == (1, None)
    body.close()
    assert (sync_kit.checked_out(), sync_kit.count()) == (0, 0)


def test_a_client_that_disconnects_in_the_middle(sync_kit):
    """The work was committed when the response started; the generator is closed, and nothing is left behind."""
    closed = []

    def app(environ, start_response):
        writing(sync_kit, 1)
        start_response("200 OK", [*HEADERS])
        try:
            yield b"1"
            yield b"2"
        finally:
            closed.append(sync_kit.checked_out())

    _, body = exchange(app, commit="on-success")
    next(body)
    body.close()
    assert (closed, sync_kit.count(), current_scope()) == ([0], 1, None)


def test_a_body_may_be_iterated_by_another_thread(sync_kit):
    """The request's scope is current wherever its next step runs, and there only."""
    found = []

    def app(environ, start_response):
        found.append(current_scope())
        writing(sync_kit, 1)
        start_response("200 OK", [*HEADERS])
        yield b"1"

    _, body = exchange(app, commit="on-success")

    def other():
        with scope("the server's") as around:
            found.append(list(body))
            assert current_scope() is around
        body.close()
        found.append(current_scope())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(LIMIT)
    assert (found[0].name, found[1:], sync_kit.count()) == ("POST /", [[b"1"], None], 1)


# -- names and environs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ({"SCRIPT_NAME": "/shop", "PATH_INFO": "/orders"}, "GET /shop/orders"),
        ({"SCRIPT_NAME": "/shop", "PATH_INFO": ""}, "GET /shop"),
    ],
)
def test_the_name_has_the_whole_path(told, name):
    """An application below a prefix is named by what the client asked for."""
    names = []

    def app(environ, start_response):
        names.append(current_scope().name)
        start_response("200 OK", [*HEADERS])
        return []

    call_wsgi(ScopeMiddleware(app), environ() | told)
    assert names == [name]


def test_an_environ_that_is_used_again_is_a_new_request():
    """As test clients do: the scope that it still names has ended."""
    scopes = []

    def app(environ, start_response):
        scopes.append(current_scope())
        start_response("200 OK", [*HEADERS])
        return []

    request = environ()
    for _ in range(2):
        call_wsgi(ScopeMiddleware(app), request)
    assert None not in scopes
    assert scopes[0] is not scopes[1]


def test_a_copied_environ_is_the_same_request():
    """A second middleware behind one that copies the environ does nothing, too."""
    scopes = []

    def app(environ, start_response):
        scopes.append(current_scope())
        start_response("200 OK", [*HEADERS])
        return []

    inner = ScopeMiddleware(app)

    def copying(environ, start_response):
        scopes.append(current_scope())
        return inner(dict(environ), start_response)

    call_wsgi(ScopeMiddleware(copying), environ())
    assert scopes[0] is scopes[1]


def test_an_async_database_is_refused_in_a_wsgi_request(tmp_path):
    """Its session could not be awaited: the error says what to open."""
    needs.module("greenlet", extra="async")
    needs.module("aiosqlite", extra="aiosqlite")
    from dbscope import AsyncDatabase

    def app(environ, start_response):
        db.session()

    db = AsyncDatabase(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}")
    answer = call_wsgi(ScopeMiddleware(app), environ())
    assert isinstance(answer.error, NoScopeError)


# -- real servers ------------------------------------------------------------------------------------------------------


@SERVERS
def test_on_a_real_server(sync_kit, serve):
    """Each request of many threads commits its own work; failed commits and errors are 500s; nothing is left."""

    def app(environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/same":
            sync_kit.session().add_all([Account(name="same"), Account(name="same")])
        elif path == "/raise":
            writing(sync_kit, 0)
            raise ZeroDivisionError
        else:
            writing(sync_kit, int(path[1:]))
        start_response("201 Created", [*HEADERS])
        return [path.encode()]

    assert sync_kit.db
    with serve(ScopeMiddleware(app, "on-success")) as port:
        paths = ["/same", "/raise", *(f"/{number}" for number in range(8))]
        answers = fetch_together(port, paths)
    assert {path: status for path, (status, _) in answers.items()} == {
        path: 500 if path in ("/same", "/raise") else 201 for path in paths
    }
    assert answers["/3"][1] == b"/3"
    assert sync_kit.amounts() == list(range(8))
    assert sync_kit.checked_out() == 0


@SERVERS
def test_failures_5_a_failed_commit_of_a_generator_is_a_500_on_a_real_server(sync_kit, serve):
    """Also where the response is begun in the body: its headers have not left."""

    def app(environ, start_response):
        sync_kit.session().add_all([Account(name="same"), Account(name="same")])
        start_response("201 Created", [*HEADERS])
        yield b"saved"

    assert sync_kit.db
    with serve(ScopeMiddleware(app, "on-success")) as port:
        status, body = fetch(port, method="POST")
    assert status == 500
    assert b"saved" not in body


@SERVERS
def test_streams_leave_a_real_server_chunk_by_chunk(sync_kit, serve):
    """The client reads the first chunk while the application waits for it to do so."""
    got_first = threading.Event()

    def app(environ, start_response):
        sync_kit.session().scalars(select(Payment)).all()
        start_response("200 OK", [*HEADERS, ("Content-Length", "2")])
        yield b"1"
        assert got_first.wait(LIMIT)
        yield b"2"

    import http.client

    assert sync_kit.db
    with serve(ScopeMiddleware(app)) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.read(1) == b"1"
        assert sync_kit.checked_out() == 0
        got_first.set()
        assert response.read(1) == b"2"
        connection.close()


@SERVERS
def test_a_file_is_served_with_its_length(serve, tmp_path):
    """A real server's file wrapper is its own object, which it recognizes."""
    (tmp_path / "file").write_bytes(b"hello")

    def app(environ, start_response):
        start_response("200 OK", [*HEADERS])
        return environ["wsgi.file_wrapper"]((tmp_path / "file").open("rb"))

    with serve(ScopeMiddleware(app)) as port:
        assert fetch(port) == (200, b"hello")
