"""The recipes: what a page tells its reader to paste is what passes the conformance kit here, taken from the page."""

import asyncio
import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import NullPool, select

from dbscope import Database
from dbscope.conformance import Base, Boom, Conformance, LoopThread, Note, Outcome
from dbscope.integrations.wsgi import ScopeMiddleware
from tests.docs.test_pages import examples
from tests.support import needs
from tests.support.web import call_wsgi, environ, fetch

PAGES = Path(__file__).parents[2] / "docs" / "how-to"


@functools.cache
def recipe(page: str) -> SimpleNamespace:
    """What the first example of a page defines."""
    name = f"{page}.md"
    found = examples((PAGES / name).read_text(encoding="utf-8"))[0]
    namespace: dict[str, Any] = {"__name__": page}
    exec(compile("\n" * (found.line - 1) + found.code, str(PAGES / name), "exec", dont_inherit=True), namespace)
    database = namespace["db"]  # the kit brings its own; another page may have one of the same URL
    if isinstance(database, Database):
        database.dispose()
    else:
        asyncio.run(database.dispose())
    return SimpleNamespace(**namespace)


def options(commit, veto):
    """For a recipe: its own idea of a veto, if the test has none."""
    return {"commit": commit} if veto is None else {"commit": commit, "veto": veto}


def asked(port, name, raised):
    """What became of a request over HTTP; the errors that the framework has shown are in `raised`."""
    status, body = fetch(port, f"/{name}", method="POST")
    return Outcome(status < 400, status, body, raised.pop(name, None))


class Recipe(Conformance):
    """What the recipes have in common: requests, and packages that are none of dbscope's extras."""

    scope_name = "POST /{}"
    needed: tuple[str, ...] = ()

    @classmethod
    def setup_class(cls):
        for name in cls.needed:
            needs.package(name)
        if cls.database == "async" or cls.handlers == "async":
            needs.module("greenlet", extra="async")
            needs.module("aiosqlite", extra="aiosqlite")


class TestQuart(Recipe):
    """An application of Quart's, by its test client."""

    database = "async"
    needed = ("quart",)

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        import quart

        app, raised = quart.Quart("conformance"), {}
        recipe("quart").add_scopes(app, **options(commit, veto))

        def view(handler):
            async def run():
                reply = await handler()
                return reply.body, reply.status

            def run_in_thread():
                reply = handler()
                return reply.body, reply.status

            return run if asyncio.iscoroutinefunction(handler) else run_in_thread

        for name, handler in handlers.items():
            app.add_url_rule(f"/{name}", name, view(handler), methods=["POST"])

        def note(app, exception, **_):
            raised[quart.request.path[1:]] = exception

        quart.got_request_exception.connect(note, app)

        async def ask(name):
            response = await app.test_client().post(f"/{name}")
            return Outcome(
                response.status_code < 400, response.status_code, await response.data, raised.pop(name, None)
            )

        with LoopThread() as loop:
            yield lambda name: loop.run(ask(name))


class TestQuartWithASyncDatabase(TestQuart):
    """Views that are no coroutine functions, which Quart runs in threads."""

    database = "sync"


class TestLitestar(Recipe):
    """An application of Litestar's, by httpx."""

    database = "async"
    needed = ("litestar", "httpx")

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        import httpx
        import litestar
        from litestar.response import Stream

        raised = {}

        def respond(reply):
            if isinstance(reply.body, bytes):
                return litestar.Response(reply.body, status_code=reply.status, media_type="text/plain")
            return Stream(reply.body, status_code=reply.status)

        def route(name, handler):
            async def run() -> litestar.Response[Any]:
                return respond(await handler())

            def run_in_thread() -> litestar.Response[Any]:
                return respond(handler())

            is_async = asyncio.iscoroutinefunction(handler)
            function = run if is_async else run_in_thread
            return litestar.post(f"/{name}", name=name, sync_to_thread=None if is_async else True)(function)

        async def note(error, scope):
            raised[scope["path"].strip("/")] = error

        app = litestar.Litestar(
            [route(name, handler) for name, handler in handlers.items()],
            plugins=[recipe("litestar").Scopes(**options(commit, veto))],
            after_exception=[note],
            logging_config=None,
        )

        async def ask(name):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
                response = await client.post(f"/{name}")
            return Outcome(response.status_code < 400, response.status_code, response.content, raised.pop(name, None))

        with LoopThread() as loop:
            yield lambda name: loop.run(ask(name))


class TestLitestarWithASyncDatabase(TestLitestar):
    """Handlers that are no coroutine functions, which Litestar runs in threads."""

    database = "sync"


class TestAiohttp(Recipe):
    """An application of aiohttp's, on its own server."""

    database = "async"
    needed = ("aiohttp",)

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        from aiohttp import web

        raised = {}

        def view(handler):
            async def run(request):
                reply = await handler()
                if isinstance(reply.body, bytes):
                    return web.Response(body=reply.body, status=reply.status)
                response = web.StreamResponse(status=reply.status)
                await response.prepare(request)
                async for part in reply.body:
                    await response.write(part)
                return response

            return run

        @web.middleware
        async def note(request, handler):
            try:
                return await handler(request)
            except Exception as error:
                raised[request.path[1:]] = error
                raise

        app = web.Application(middlewares=[note])
        recipe("aiohttp").add_scopes(app, **options(commit, veto))
        for name, handler in handlers.items():
            app.router.add_post(f"/{name}", view(handler))

        async def start():
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            return runner, runner.addresses[0][1]

        with LoopThread() as loop:
            runner, port = loop.run(start())
            try:
                yield lambda name: asked(port, name, raised)
            finally:
                loop.run(runner.cleanup())


class TestTornado(Recipe):
    """An application of Tornado's, on its own server."""

    database = "async"
    needed = ("tornado",)

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        from tornado.httpserver import HTTPServer
        from tornado.netutil import bind_sockets
        from tornado.web import Application

        raised, decides = {}, veto

        class Handler(recipe("tornado").ScopedHandler):
            def veto(self, status):
                return super().veto(status) if decides is None else decides(status)

            def initialize(self, handler):
                self.handler, self.commit = handler, commit

            async def post(self):
                reply = await self.handler()
                self.set_status(reply.status)
                if isinstance(reply.body, bytes):
                    self.write(reply.body)
                    return
                await self.flush()
                async for part in reply.body:
                    self.write(part)
                    await self.flush()

            def log_exception(self, kind, error, traceback):
                raised[self.request.path[1:]] = error
                super().log_exception(kind, error, traceback)

        app = Application([(f"/{name}", Handler, {"handler": handler}) for name, handler in handlers.items()])

        async def start():
            server = HTTPServer(app)
            sockets = bind_sockets(0, "127.0.0.1")
            server.add_sockets(sockets)
            return server, sockets[0].getsockname()[1]

        async def stop(server):
            server.stop()
            await server.close_all_connections()

        with LoopThread() as loop:
            server, port = loop.run(start())
            try:
                yield lambda name: asked(port, name, raised)
            finally:
                loop.run(stop(server))


class TestTornadoWithASyncDatabase(TestTornado):
    """Coroutine functions that use a sync database, on the loop's only thread."""

    database = "sync"
    handlers = "async"


class Pyramid(Recipe):
    """An application of Pyramid's, called as a server calls it."""

    needed = ("pyramid.config", "pyramid_tm", "zope.sqlalchemy")

    def wsgi_app(self, config, commit, veto):
        raise NotImplementedError

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        from pyramid.config import Configurator
        from pyramid.response import Response

        def view(handler):
            def run(request):
                reply = handler()
                if isinstance(reply.body, bytes):
                    return Response(reply.body, status=reply.status)
                return Response(app_iter=reply.body, status=reply.status)

            return run

        with Configurator() as config:
            for name, handler in handlers.items():
                config.add_route(name, f"/{name}")
                config.add_view(view(handler), route_name=name)
            app = self.wsgi_app(config, commit, veto)

        def send(name):
            answer = call_wsgi(app, environ("POST", f"/{name}"))
            return Outcome(answer.status < 400, answer.status, answer.body, answer.error)

        yield send


class TestPyramidBesidePyramidTm(Pyramid):
    """What commits is pyramid_tm; where nothing is to be committed for the handlers, it is left out."""

    def wsgi_app(self, config, commit, veto):
        if commit is not None:
            decides = {} if veto is None else {"veto": lambda request, response: veto(response.status_int)}
            recipe("pyramid").add_pyramid_tm(config, self.db, **decides)
        return ScopeMiddleware(config.make_wsgi_app())


class TestPyramid(Pyramid):
    """What commits is dbscope."""

    def wsgi_app(self, config, commit, veto):
        if commit is not None:
            recipe("pyramid").add_commit(config, **({} if veto is None else {"veto": veto}))
        return ScopeMiddleware(config.make_wsgi_app(), commit, veto=veto)


# -- what a recipe adds to the kit's promises --------------------------------------------------------------------------


@pytest.fixture
def tornado_answers():
    """Called with a handler's methods: what a client gets from it, and which methods ran."""
    TestTornado.setup_class()
    from tornado.httpserver import HTTPServer
    from tornado.netutil import bind_sockets
    from tornado.web import Application

    with LoopThread() as loop:

        async def start(handler):
            server = HTTPServer(Application([("/", handler)]))
            sockets = bind_sockets(0, "127.0.0.1")
            server.add_sockets(sockets)
            return server, sockets[0].getsockname()[1]

        async def stop(server):
            server.stop()
            await server.close_all_connections()

        def ask(**methods):
            handler = type("Handler", (recipe("tornado").ScopedHandler,), {"commit": "on-success"} | methods)
            server, port = loop.run(start(handler))
            try:
                return fetch(port, "/", method="POST")
            finally:
                loop.run(stop(server))

        yield ask


def test_tornado_goes_no_further_than_a_finish_in_prepare(tornado_answers):
    """A request that `prepare()` has refused does not reach its handler, although the response is still to leave."""
    ran = []

    def prepare(self):
        self.set_status(403)
        self.finish("no")

    def post(self):
        ran.append("post")

    assert tornado_answers(prepare=prepare, post=post) == (403, b"no")
    assert ran == []


def test_tornado_answers_for_an_error_after_finish(tornado_answers):
    """What is rolled back is not called a success, which the handler had meant to say."""

    def post(self):
        self.finish("saved")
        raise Boom

    status, body = tornado_answers(post=post)
    assert (status, b"saved" in body) == (500, False)


def test_tornado_answers_for_a_response_that_cannot_be_sent(tornado_answers):
    """As it does without a scope: the client is not kept waiting."""

    def post(self):
        self.set_status(204)
        self.write("a body that 204 has not")

    assert tornado_answers(post=post)[0] == 500


@pytest.fixture
def keep(tmp_path):
    """Write a note into the database of `keep.db`; `keep.kept()` is what was committed."""
    url = f"sqlite:///{tmp_path / 'kept.db'}"
    db = Database(url, poolclass=NullPool)
    Base.metadata.create_all(db.engine)

    def keep(body):
        db.session.add(Note(body=body))
        db.session.flush()

    def kept():
        with db.reader() as session:
            return session.scalars(select(Note.body)).all()

    keep.kept, keep.db = kept, db
    yield keep
    db.dispose()


def test_tornado_rolls_back_after_an_error_whatever_the_veto(tornado_answers, keep):
    """An exception is no answer; an `HTTPError` is one, and the veto has the word."""

    def fail(self):
        keep("lost")
        raise Boom

    def refuse(self):
        from tornado.web import HTTPError

        keep("kept")
        raise HTTPError(409)

    for post, status in {fail: 500, refuse: 409}.items():
        assert tornado_answers(post=post, veto=lambda self, status: False)[0] == status
    assert keep.kept() == ["kept"]


def test_litestar_asks_the_veto_about_what_its_exception_handlers_say(keep):
    """They answer without the `after_request` function."""
    TestLitestar.setup_class()
    from litestar import Litestar, post
    from litestar.exceptions import ClientException
    from litestar.testing import TestClient

    @post("/", sync_to_thread=True)
    def refuse() -> None:
        keep("kept")
        raise ClientException(status_code=409)

    scopes = recipe("litestar").Scopes(commit="on-success", veto=lambda status: status >= 500)
    with TestClient(Litestar([refuse], plugins=[scopes], logging_config=None)) as client:
        assert client.post("/").status_code == 409
    assert keep.kept() == ["kept"]


def test_quart_answers_for_a_commit_that_failed_without_a_second_error(keep, caplog):
    """The page of the error passes the `after_request` functions once more, when the work is over."""
    TestQuart.setup_class()
    from quart import Quart

    app = Quart("careless")
    recipe("quart").add_scopes(app, commit="on-success")

    @app.post("/")
    async def clash():
        keep.db.session.add_all([Note(body="same"), Note(body="same")])
        return "saved"

    assert asyncio.run(app.test_client().post("/")).status_code == 500
    assert [record.message for record in caplog.records] == ["Exception on request POST /"]
    assert keep.kept() == []
