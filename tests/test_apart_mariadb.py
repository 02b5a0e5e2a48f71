"""Work apart on MariaDB, where a server answers: its limits."""

from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from dbscope import ConfigurationError, Database
from tests.support import needs

URL = make_url("mariadb+pymysql://root@127.0.0.1:3306/information_schema")  # as in test_retry_mariadb.py
LIMITS = text("SELECT @@lock_wait_timeout, @@innodb_lock_wait_timeout, @@max_statement_time")


def test_apart_limits_on_mariadb():
    """Waiting for a lock is limited in whole seconds, at least what was asked for; the application's limits are not."""
    try:
        db = Database(URL, connect_args={"connect_timeout": 2, "init_command": "SET max_statement_time = 7"})
        with db.reader() as session:
            before = session.execute(LIMITS).one()
    except (ConfigurationError, DBAPIError) as error:
        needs.spare(f"no MariaDB that lets root in at {URL.host}:{URL.port}: {getattr(error, 'orig', error)}")
    with db:
        assert before[2] == 7
        for options, told in (
            ({}, (5, 5, 0)),
            ({"lock_timeout": 1.2, "statement_timeout": 2.5}, (2, 2, 2.5)),
            ({"lock_timeout": None}, (31_536_000, 31_536_000, 0)),
        ):
            with db.apart("migration", **options) as beside, beside.reader() as session:
                assert tuple(session.execute(LIMITS).one()) == told
        with db.reader() as session:
            assert session.execute(LIMITS).one() == before
