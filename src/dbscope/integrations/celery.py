"""Scopes for the tasks of a Celery application, and messages that wait for the commit."""

import functools
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any, Literal

from dbscope.errors import ConfigurationError
from dbscope.integrations._sending import hold, warn
from dbscope.scope import Commit, PlacedScope
from dbscope.where import Place, pass_over

try:
    from celery import Celery
    from celery.result import EagerResult
    from celery.utils import uuid
    from kombu import serialization
except ImportError as error:
    raise ImportError(
        'scopes for Celery need Celery 5.3 or newer: pip install "dbscope[celery]"', name=error.name
    ) from error

__all__ = ["CeleryScopes"]

Send = Literal["after-commit"] | None

pass_over("celery", "kombu", "billiard", "vine")


class CeleryScopes:
    """Runs each task of a Celery application in a scope of its own, in every pool, and eagerly, too.

    A task's scope is named by the task and its id. It opens before the task's function is called and ends when that
    has returned or raised, before Celery records an outcome: with `commit="on-success"` a commit that fails is the
    failure of the task, and of `autoretry_for`, and nobody is told of a success. A task that is called as a function
    is a part of its caller's work.

    Args:
        app: the application; its tasks may be declared before or later.
        commit: None, and the tasks commit by themselves; `"on-success"`, and each task is one managed transaction for
            each database that it uses: committed if it returned, and before it is replaced (`Task.replace`); rolled
            back if it raised, be that `Retry`, `Ignore` or `Reject`.
        send: None, and a task that is sent inside of a transaction with uncommitted writes is sent at once, with the
            warning `SentBeforeCommit`; `"after-commit"`, and a task that is sent inside of a transaction is sent when
            that has been committed, and never if it is rolled back. What a task sends to go on by itself (a retry, a
            replacement) does not wait.

    Raises:
        ConfigurationError: this is no Celery application, has scopes already, its worker runs already, Celery is older
            than 5.3, or an option is not one of these.

    >>> from celery import Celery
    >>> app = Celery("shop")
    >>> scopes = CeleryScopes(app, commit="on-success", send="after-commit")
    """

    def __init__(self, app: Celery, *, commit: Commit = None, send: Send = None) -> None:
        _check(app, commit, send)
        self.app = app
        self.commit = commit
        self.send = send
        app._dbscope = self
        app._task_from_fun = self._taking(app._task_from_fun)
        app.register_task = self._taking(app.register_task)
        app.send_task = self._sending(app.send_task)
        # What was declared before is there already, or a promise still, kept when it is first used.
        self._take_all()
        for declared in app._pending:
            declared.__then__(self._take_all)

    def _take_all(self) -> None:
        for task in [*self.app._tasks.values()]:
            self._take(task)

    def _taking(self, register: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(register)
        def registered(*args: Any, **kwargs: Any) -> Any:
            return self._take(register(*args, **kwargs))

        return registered

    def _take(self, task: Any) -> Any:
        """Run a task's function in a scope from now on, unless it does."""
        if "_dbscope" not in vars(task):
            task._dbscope = self
            # Below `autoretry_for`, which is to see a commit that fails, and sends the retry when the scope has ended.
            name = "_orig_run" if hasattr(task, "_orig_run") else "run"
            setattr(task, name, self._in_scope(task, getattr(task, name)))
            task.on_replace = _then_replace(task, task.on_replace)
            task.apply_async = self._sending_eagerly(task, task.apply_async)
        return task

    def _in_scope(self, task: Any, run: Callable[..., Any]) -> Callable[..., Any]:
        place = _place(run)

        @functools.wraps(run)
        def run_in_scope(*args: Any, **kwargs: Any) -> Any:
            request = task.request
            if request.called_directly or request.get("_dbscope") is not None:
                return run(*args, **kwargs)
            with PlacedScope(f"{task.name}[{request.id}]", place, commit=self.commit) as work:
                request._dbscope = work
                return run(*args, **kwargs)

        return run_in_scope

    # -- sending ---------------------------------------------------------------------------------------------------

    def _sending(self, send_task: Callable[..., Any]) -> Callable[..., Any]:
        """`app.send_task`, by which every message goes: of `delay`, of `apply_async` and of a canvas."""

        @functools.wraps(send_task)
        def send(
            name: str,
            args: Any = None,
            kwargs: Any = None,
            countdown: Any = None,
            eta: Any = None,
            task_id: str | None = None,
            producer: Any = None,
            **options: Any,
        ) -> Any:
            task_id = task_id or uuid()
            by = functools.partial(send_task, name, countdown=countdown, eta=eta, task_id=task_id, **options)

            def prepare() -> Callable[[], Any]:
                # Without the producer, which a group has lent to its parts, and will be another's by then.
                serializer = options.get("serializer") or getattr(self.app._tasks.get(name), "serializer", None)
                return functools.partial(by, *self._frozen(args, kwargs, serializer))

            if self._goes_on(task_id) or not self._held(name, task_id, prepare):
                return by(args, kwargs, producer=producer)
            result = (options.get("result_cls") or self.app.AsyncResult)(task_id)
            result.ignored = options.get("ignore_result")
            return result

        return send

    def _sending_eagerly(self, task: Any, apply_async: Callable[..., Any]) -> Callable[..., Any]:
        """`Task.apply_async`, which runs the task here where `task_always_eager` is set, and so in our hands."""

        @functools.wraps(apply_async)
        def send(args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
            if more or not self.app.conf.task_always_eager:
                return apply_async(args, kwargs, *more, **options)
            task_id = options["task_id"] = options.get("task_id") or uuid()
            result = EagerResult(task_id, None, "PENDING", name=task.name)

            def prepare() -> Callable[[], Any]:
                frozen = self._frozen(args, kwargs, options.get("serializer") or task.serializer)
                return lambda: vars(result).update(vars(apply_async(*frozen, **options)))

            return result if self._held(task.name, task_id, prepare) else apply_async(args, kwargs, **options)

        return send

    def _held(self, name: str, task_id: str, prepare: Callable[[], Callable[[], Any]]) -> bool:
        """Whether a message waits for the commit; warn if it should and must not."""
        if self.send is not None:
            return hold(prepare, f"send {name}[{task_id}]")
        warn(
            name,
            f"Send it by `db.on_commit({name.rpartition('.')[2]}.delay, ...)`, or install "
            'CeleryScopes(app, send="after-commit"), which waits for the commit.',
        )
        return False

    def _goes_on(self, task_id: str) -> bool:
        """Whether it is the running task that goes on: as a retry, or as what it is replaced by."""
        task = self.app.current_worker_task
        return task is not None and (task.request.id == task_id or task.request.get("_dbscope_replaced") is not None)

    def _frozen(self, args: Any, kwargs: Any, serializer: str | None) -> tuple[Any, Any]:
        """The arguments as a worker would get them now: what cannot be sent fails here, and changes come too late."""
        dumps: Any = serialization.dumps
        loads: Any = serialization.loads
        kind, encoding, data = dumps((args, kwargs), serializer or self.app.conf.task_serializer)
        args, kwargs = loads(data, kind, encoding, accept=[kind])
        return args, kwargs


def _then_replace(task: Any, on_replace: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`Task.on_replace`, which sends what goes on in a task's place: after the commit, for it is to find the rows."""

    @functools.wraps(on_replace)
    def commit_and_replace(signature: Any) -> Any:
        work = task.request.get("_dbscope")
        if work is not None and work.commit is not None:
            work.finish()
        task.request._dbscope_replaced = True
        return on_replace(signature)

    return commit_and_replace


def _place(run: Callable[..., Any]) -> Place | None:
    """Where a task's function begins."""
    code = getattr(inspect.unwrap(run), "__code__", None)
    return None if code is None else (code, -1)


def _check(app: Any, commit: Any, send: Any) -> None:
    """Raise where the scopes could not work, while the application is put together."""
    version = metadata.version("celery")
    if tuple(map(int, version.split(".")[:2])) < (5, 3):
        raise ConfigurationError(
            f"scopes for Celery need Celery 5.3 or newer, and this is {version}: pip install -U celery"
        )
    if not isinstance(app, Celery):
        raise ConfigurationError(f"the scopes of a Celery application are given the application, not {app!r}.")
    if commit is not None and commit != "on-success":
        raise ConfigurationError(f'commit is None or "on-success", not {commit!r}.')
    if send is not None and send != "after-commit":
        raise ConfigurationError(f'send is None or "after-commit", not {send!r}.')
    if "_dbscope" in vars(app):
        raise ConfigurationError(f"{app!r} has scopes already. Install them once, where the application is made.")
    if any(task.__trace__ is not None for task in app._tasks.values()):
        raise ConfigurationError(
            f"a worker of {app!r} runs already, and would not notice. Install the scopes where the application is made."
        )
