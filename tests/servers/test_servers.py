"""Every payment is booked whole or not at all, on each server, while others fail, time out and are hung up on."""

import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.servers.ledger import Base
from tests.support import needs
from tests.support.hosts import hosts
from tests.support.kits import LIMIT
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import Postgres
from tests.support.servers import COMMANDS, load, served
from tests.support.web import fetch, fetch_together, wait_for

pytestmark = pytest.mark.programs

needs.module("flask", extra="flask")
needs.module("fastapi", extra="fastapi")
needs.module("asyncpg", extra="asyncpg")

KINDS = ("/pay", "/fail", "/pay", "/clash", "/pay", "/late", "/pay", "/slow")
OF_THREADS = tuple(f"/sync{kind}" for kind in KINDS)  # FastAPI's `def` endpoints
HANG_UPS = 20


def hang_up(address, path):
    """Send a request, and go away before there is an answer."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=LIMIT) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())


def ids(engine, table):
    """The ids of all rows of a table."""
    with engine.connect() as connection:
        return set(connection.scalars(text(f"SELECT id FROM {table}")))


def busy(engine):
    """The connections of others to this database that are not simply idle."""
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT state, query FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND state <> 'idle'"
            )
        )
        return [tuple(row) for row in rows]


def given_out(address):
    """How many connections the pools of the server's processes have given out, as far as they answer."""
    host, port = address
    status, body = fetch(port, "/rest", host=host)
    assert status == 200
    return json.loads(body)["checked_out"]


def warm_up(address):
    """Have each process import the application."""
    host, port = address
    answers = fetch_together(port, [f"/pay?id=warm-{host}-{number}" for number in range(8)], host=host)
    assert {status for status, _ in answers.values()} == {201}, answers


def come_to_rest(engine, *addresses):
    """Wait until nobody works, and nothing is given out."""
    wait_for(lambda: not busy(engine))
    wait_for(lambda: sum(given_out(address) for address in addresses for _ in range(6)) == 0)


def account_for(engine, *loads):
    """Compare what is booked with what was answered."""
    debits, credits = ids(engine, "debits"), ids(engine, "credits")
    engine.dispose()
    assert debits == credits, "a payment is half booked"
    assert {id.partition("-")[0] for id in debits} <= {"pay", "slow", "gone", "warm"}, "what failed is booked"
    for found in loads:
        assert found.saved <= debits, "a payment that was answered with 201 is not there"
        assert set(found.statuses) == {201, 500}
        assert sum(found.statuses.values()) == found.requests
        assert found.statuses[201] == len(found.saved)
        assert found.errors == {"connect": 0, "read": 0, "write": 0, "timeout": 0}


def paths_of(server):
    """What the server's application has."""
    return (*KINDS, *OF_THREADS) if "asgi" in COMMANDS[server][-1] else KINDS


@pytest.mark.parametrize("server", COMMANDS)
def test_every_answer_is_accounted_for_and_no_payment_is_half_booked(server, postgres_url):
    """What was answered with 201 is booked; what failed is not; whatever is booked is booked twice; nothing is left."""
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    with served(server, postgres_url) as address:
        warm_up(address)
        clients = [
            threading.Thread(target=hang_up, args=(address, f"/slow?id=gone-{number}")) for number in range(HANG_UPS)
        ]
        for client in clients:
            client.start()
        found = load(address, paths_of(server))
        for client in clients:
            client.join(LIMIT)
        come_to_rest(engine, address)
    account_for(engine, found)


@pytest.mark.parametrize("between", ["directly", "by PgBouncer"])
def test_two_hosts_on_one_postgresql(between):
    """A Flask application in two processes on one host, a FastAPI application on the other: all is accounted for.

    Each checks at its start that all processes together get the connections that they may ask for.
    """
    with contextlib.ExitStack() as stack:
        first, second = stack.enter_context(hosts(2))
        postgres = stack.enter_context(Postgres(remote=True))
        url = make_url(postgres.url(database=postgres.create_database()))
        engine = create_engine(url)
        Base.metadata.create_all(engine)
        options = {"LEDGER_PROCESSES": "6"}  # with the asyncpg pool of the second's
        if between == "by PgBouncer":
            pooler = stack.enter_context(PgBouncer(str(url), address="0.0.0.0", pool_size=6))
            url = url.set(port=pooler.port)
            options["LEDGER_POOLER"] = "1"
        servers = {"gunicorn-gthread": first, "uvicorn": second}
        addresses = {
            server: stack.enter_context(served(server, str(url.set(host=host.gateway)), host, **options))
            for server, host in servers.items()
        }
        for address in addresses.values():
            warm_up(address)
        with ThreadPoolExecutor() as pool:
            loads = [
                pool.submit(load, address, paths_of(server), name=f"{server}-", connections=8)
                for server, address in addresses.items()
            ]
            found = [each.result() for each in loads]
        come_to_rest(engine, *addresses.values())
        account_for(engine, *found)
