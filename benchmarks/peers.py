"""What dbscope is compared with: other libraries' sessions, on engines like its own.

Each is set up as its documentation says, at its best. They are imported when they are asked for.
"""

import asyncio
import threading
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session, scoped_session, sessionmaker

REQUEST: ContextVar[str | None] = ContextVar("request", default=None)


def galaxy(maker: "sessionmaker[Session]") -> SimpleNamespace:
    """Galaxy's model object: a registry keyed by the request's id, and by the thread outside of requests."""
    registry = scoped_session(maker, scopefunc=lambda: REQUEST.get() or threading.get_ident())

    def set_request_id(id: str) -> Any:
        return REQUEST.set(id)

    def unset_request_id(id: str) -> None:
        if id in registry.registry.registry:
            registry.registry.registry[id].close()
            del registry.registry.registry[id]

    return SimpleNamespace(session=registry, set_request_id=set_request_id, unset_request_id=unset_request_id)


def sqlite_engine(path: Path) -> Any:
    """What the others use on SQLite: the settings and the explicit BEGIN of dbscope's, as cheap as it gets.

    The BEGIN goes into the dialect. SQLAlchemy's documented recipe, a listener on the engine's "begin", costs a
    quarter of a SELECT; it is a contender of its own.
    """
    return like_ours(create_engine(f"sqlite:///{path}"))


def like_ours(engine: Any) -> Any:
    """Give an engine on SQLite that was not used yet the settings of dbscope's."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")

    return engine


def begin_in_dialect(engine: Any, begin: str = "BEGIN") -> Any:
    """Let the engine begin explicitly."""
    engine.dialect.do_begin = lambda connection: connection.execute(begin)
    return engine


def begin_by_recipe(engine: Any) -> Any:
    """The same by SQLAlchemy's documented recipe."""
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def flask_sqlalchemy(path: Path) -> tuple[Any, Any]:
    """A Flask application, and Flask-SQLAlchemy in it."""
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    app = Flask("bank")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{path}"
    database = SQLAlchemy(app)
    with app.app_context():
        begin_in_dialect(like_ours(database.engine))
    return app, database


def flask_sqlalchemy_lite(path: Path) -> tuple[Any, Any]:
    """A Flask application, and Flask-SQLAlchemy-Lite in it."""
    from flask import Flask
    from flask_sqlalchemy_lite import SQLAlchemy

    app = Flask("bank")
    app.config["SQLALCHEMY_ENGINES"] = {"default": f"sqlite:///{path}"}
    database = SQLAlchemy(app)
    with app.app_context():
        begin_in_dialect(like_ours(database.engine))
    return app, database


# Those listen to each flush, for columns that no model here has.
NO_LISTENERS = {"enable_touch_updated_timestamp_listener": False, "enable_file_object_listener": False}


def advanced_alchemy_flask(engine: Any) -> tuple[Any, Any]:
    """A Flask application, and Advanced Alchemy in it."""
    from advanced_alchemy.extensions.flask import AdvancedAlchemy, SQLAlchemySyncConfig
    from flask import Flask

    app = Flask("bank")
    return app, AdvancedAlchemy(SQLAlchemySyncConfig(engine_instance=engine, **NO_LISTENERS), app)


def advanced_alchemy_fastapi(engine: Any) -> tuple[Any, Any]:
    """A FastAPI application, and Advanced Alchemy in it; with an async engine, or a sync one."""
    from advanced_alchemy.extensions.fastapi import AdvancedAlchemy, SQLAlchemyAsyncConfig, SQLAlchemySyncConfig
    from fastapi import FastAPI

    app = FastAPI()
    config = SQLAlchemySyncConfig if isinstance(engine, Engine) else SQLAlchemyAsyncConfig
    return app, AdvancedAlchemy(config(engine_instance=engine, **NO_LISTENERS), app)


def oslo_db(engine: Any) -> tuple[Any, Any]:
    """oslo.db's enginefacade: its reader, and a context to read in.

    It works on `engine`: one of its own on SQLite has no pool, and opens the file for each piece of work.
    """
    from oslo_db.sqlalchemy import enginefacade

    facade = enginefacade.transaction_context()
    facade.configure(connection="sqlite://")
    facade.patch_engine(engine)
    return facade.reader, enginefacade.transaction_context_provider(type("Request", (), {}))()


def async_registry() -> Any:
    """SQLAlchemy's registry of async sessions, one for each task. Its driver is never reached."""
    from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine

    maker = async_sessionmaker(create_async_engine("sqlite+aiosqlite://"))
    return async_scoped_session(maker, scopefunc=asyncio.current_task)
