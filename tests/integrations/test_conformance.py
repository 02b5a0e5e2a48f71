"""The conformance kit, passed by the middlewares, Flask and Celery; and that it fails what keeps no promise."""

import contextlib
import threading
from typing import Any

import pytest

from dbscope import ConfigurationError
from dbscope.conformance import Conformance, LoopThread, Outcome
from dbscope.integrations import asgi, wsgi
from tests.support import needs
from tests.support.web import call_asgi, call_wsgi, environ, http_scope


class TestWsgi(Conformance):
    """A bare application in the WSGI middleware."""

    scope_name = "POST /{}"

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        def app(environ, start_response):
            reply = handlers[environ["PATH_INFO"][1:]]()
            start_response(f"{reply.status} Said", [("Content-Type", "text/plain")])
            return [reply.body] if isinstance(reply.body, bytes) else reply.body

        wrapped = wsgi.ScopeMiddleware(app, commit, veto=veto)

        def send(name):
            answer = call_wsgi(wrapped, environ("POST", f"/{name}"))
            return Outcome(answer.status < 400, answer.status, answer.body, answer.error)

        yield send


class TestAsgi(Conformance):
    """A bare application in the ASGI middleware, with an async database."""

    scope_name = "POST /{}"
    database = "async"

    @classmethod
    def setup_class(cls):
        needs.module("greenlet", extra="async")
        needs.module("aiosqlite", extra="aiosqlite")

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        async def app(request, receive, send):
            reply = await handlers[request["path"][1:]]()
            await send({"type": "http.response.start", "status": reply.status, "headers": []})
            if isinstance(reply.body, bytes):
                await send({"type": "http.response.body", "body": reply.body})
                return
            async for part in reply.body:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})

        wrapped = asgi.ScopeMiddleware(app, commit, veto=veto)
        with LoopThread() as loop:

            def send(name):
                answer = loop.run(call_asgi(wrapped, http_scope("POST", f"/{name}")))
                return Outcome(answer.status < 400, answer.status, answer.body, answer.error)

            yield send


class TestAsgiWithASyncDatabase(TestAsgi):
    """Coroutine functions that use a sync database, whose end comes in a thread."""

    database = "sync"
    handlers = "async"

    @classmethod
    def setup_class(cls):
        """It needs no extra."""


class TestFlask(Conformance):
    """Views of a Flask application, by its test client."""

    scope_name = "POST /{}"

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        flask: Any = needs.module("flask", extra="flask")
        scopes: Any = needs.module("dbscope.integrations.flask", extra="flask")
        app = flask.Flask("conformance")
        scopes.Scopes(app, commit=commit, veto=veto)

        def view(handler):
            def run():
                reply = handler()
                return reply.body, reply.status

            return run

        for name, handler in handlers.items():
            app.add_url_rule(f"/{name}", name, view(handler), methods=["POST"])

        raised = threading.local()  # the test client runs the application in the thread that sends

        def note(app, exception):
            raised.error = exception

        flask.got_request_exception.connect(note, app)

        def send(name):
            raised.error = None
            response = app.test_client().post(f"/{name}")
            return Outcome(response.status_code < 400, response.status_code, response.data, raised.error)

        yield send


class TestCelery(Conformance):
    """Tasks of a Celery application that are applied eagerly."""

    scope_name = "{0}[{0}]"
    not_applicable = {"veto": "a task has no status", "streams": "a task has no response"}

    @contextlib.contextmanager
    def serve(self, handlers, *, commit, veto):
        celery: Any = needs.module("celery", extra="celery")
        scopes: Any = needs.module("dbscope.integrations.celery", extra="celery")
        app = celery.Celery("conformance", backend="cache+memory://", set_as_current=False)
        app.conf.broker_transport = "tests.support.workers:Memory"
        app.conf.broker_transport_options = {"polling_interval": 0.01}
        scopes.CeleryScopes(app, commit=commit)
        tasks = {name: app.task(_nothing_of(handler), name=name, shared=False) for name, handler in handlers.items()}
        with app, self.send_to(app, tasks) as send:
            yield send

    @contextlib.contextmanager
    def send_to(self, app, tasks):
        def send(name):
            result = tasks[name].apply(task_id=name)
            return Outcome(result.successful(), error=None if result.successful() else result.result)

        yield send


class TestCeleryWorker(TestCelery):
    """Tasks of a worker with a pool of threads."""

    @contextlib.contextmanager
    def send_to(self, app, tasks):
        testing: Any = needs.module("celery.contrib.testing.worker", extra="celery")

        def send(name):
            result = tasks[name].apply_async(task_id=name)
            error = result.get(timeout=self.limit, interval=0.01, propagate=False)
            ok = result.successful()
            result.forget()  # the next one has the same id
            return Outcome(ok, error=None if ok else error)

        with testing.start_worker(app, pool="threads", concurrency=4, perform_ping_check=False, loglevel="CRITICAL"):
            yield send


def _nothing_of(handler):
    """The handler as a task, whose result can be sent."""

    def task():
        handler()

    return task


# -- the kit itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        ({"not_applicable": {"rollback": "too hard"}}, "'rollback'; what may not apply is veto, streams, together"),
        ({"not_applicable": {"veto": " "}}, "does not say why 'veto' does not apply"),
        ({"database": "async", "handlers": "sync"}, "no use for an async database"),
    ],
)
def test_a_subclass_that_cannot_be_meant(attributes, complaint):
    """Is refused where it is written: nobody leaves out a promise by a misspelt word."""
    with pytest.raises(ConfigurationError, match=complaint):
        type("TestOurs", (Conformance,), attributes)
