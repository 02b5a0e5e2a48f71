"""The clients: real HTTP requests, among them some that hang up, and a log of what came back."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx

from dbscope.cli.demo.books import ACCOUNTS, RESERVE, Order
from dbscope.cli.demo.misbehaviour import MISBEHAVIOURS, Misbehaviour

__all__ = ["Load", "Sent"]

PATIENCE = 60.0  # seconds that a client waits for an answer
DOORS = ("async", "sync", "wsgi")
LINES = 3  # of a stream that is read, before its client hangs up

# What clients ask for, and how often; a tenth of it misbehaves, another tenth hangs up.
_WEIGHTS = {"pay": 60, "half-way": 6, "report": 7, "overview": 4, "job": 6, "misbehave": 10, "hang up": 7}


@dataclass
class Sent:
    """One request, and what its client knows of it."""

    id: str
    door: str
    name: str  # of the endpoint
    order: Order | None = None
    misbehaviour: Misbehaviour | None = None
    hangs_up: bool = False
    status: int | None = None
    body: Mapping[str, Any] | None = None  # None: a stream, or nobody waited for it
    lines: tuple[str, ...] = ()
    cut: bool = False  # the server broke the connection off
    failure: str | None = None  # what nobody meant to happen

    @property
    def booked(self) -> bool:
        """Whether the client was told that its money is booked."""
        return self.status == 201


class Load:
    """Clients that send requests until the time is over, or enough are sent.

    Each mistake is sent once through each door before any other; the rest is drawn.

    Args:
        urls: the servers', by `asgi` and `wsgi`.
        clients: how many send at the same time.
        seconds: for how long.
        requests: how many at most; every mistake is sent in any case.
        seed: for what is drawn.
    """

    def __init__(
        self, urls: Mapping[str, str], *, clients: int, seconds: float, requests: int | None, seed: int = 1
    ) -> None:
        self.urls = urls
        self.clients = clients
        self.seconds = seconds
        self.requests = requests
        self.sent: list[Sent] = []
        self.waiting = 0
        self.started = 0.0
        self._dice = random.Random(seed)
        self._first = deque(self._each_mistake())

    @property
    def elapsed(self) -> float:
        """The seconds since the first request."""
        return time.monotonic() - self.started if self.started else 0.0

    @property
    def done(self) -> float:
        """Which part of the load is through, from 0 to 1."""
        by_time = self.elapsed / self.seconds
        by_count = len(self.sent) / self.requests if self.requests else 0.0
        return min(1.0, max(by_time, by_count))

    async def run(self) -> None:
        """Send everything."""
        self.started = time.monotonic()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=PATIENCE, limits=limits, trust_env=False) as http:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.clients):
                    group.create_task(self._client(http))

    async def _client(self, http: httpx.AsyncClient) -> None:
        while self._first or self.done < 1.0:
            await self._send(http, self._next())

    # -- what is sent ------------------------------------------------------------------------------------------

    def _each_mistake(self) -> Iterator[tuple[Misbehaviour, str]]:
        for misbehaviour in MISBEHAVIOURS:
            for door in doors_of(misbehaviour):
                yield misbehaviour, door

    def _next(self) -> Sent:
        number = len(self.sent)
        if self._first and number % 2:
            misbehaviour, door = self._first.popleft()
            return self._draw("misbehave", misbehaviour, door)
        [what] = self._dice.choices([*_WEIGHTS], [*_WEIGHTS.values()])
        misbehaviour = self._dice.choice(MISBEHAVIOURS)
        door = self._dice.choice(doors_of(misbehaviour) if what == "misbehave" else DOORS)
        return self._draw(what, misbehaviour, door)

    def _draw(self, what: str, misbehaviour: Misbehaviour, door: str) -> Sent:
        sent = Sent(f"r{len(self.sent):06}", door, what)
        self.sent.append(sent)
        if what == "misbehave":
            sent.misbehaviour = misbehaviour
            sent.name = misbehaviour.name
            sent.order = replace(self._order(sent.id, "transfer"), payer=RESERVE)
        elif what == "hang up":
            sent.hangs_up = True
            sent.name = self._dice.choice(["pay", "report"])
        if sent.name == "pay":
            sent.order = self._order(sent.id, self._dice.choice(["deposit", "withdraw", "transfer", "transfer"]))
        elif sent.name in ("half-way", "job"):
            sent.order = self._order(sent.id, "transfer" if sent.name == "half-way" else "deposit")
        return sent

    def _order(self, id: str, kind: str) -> Order:
        payer, payee = self._dice.sample(ACCOUNTS[1:], 2)
        amount = self._dice.randint(1, 99_99)
        return Order(id, None if kind == "deposit" else payer, None if kind == "withdraw" else payee, amount)

    # -- how ---------------------------------------------------------------------------------------------------

    async def _send(self, http: httpx.AsyncClient, sent: Sent) -> None:
        url = f"{self.urls['wsgi' if sent.door == 'wsgi' else 'asgi']}/{sent.door}/{sent.name}"
        order = sent.order
        asked = {} if order is None else {"payer": order.payer, "payee": order.payee, "amount": str(order.amount)}
        query = {"id": sent.id, **{name: value for name, value in asked.items() if value is not None}}
        self.waiting += 1
        try:
            if sent.hangs_up and sent.order is not None:
                return await self._drop(httpx.Request("POST", url, params=query))
            async with http.stream("POST", url, params=query) as response:
                sent.status = response.status_code
                if response.headers["content-type"] == "application/json":
                    await response.aread()
                    sent.body = response.json()
                else:
                    await self._read(response, sent)
        except httpx.RemoteProtocolError as error:
            sent.cut = sent.status is not None
            sent.failure = None if sent.cut else repr(error)
        except (httpx.HTTPError, OSError) as error:
            sent.failure = repr(error)
        finally:
            self.waiting -= 1

    async def _read(self, response: httpx.Response, sent: Sent) -> None:
        lines = []
        async for line in response.aiter_lines():
            lines.append(line)
            if sent.hangs_up and len(lines) == LINES:
                break
        sent.lines = tuple(lines)

    async def _drop(self, request: httpx.Request) -> None:
        """Send a request, and hang up before anything can come back."""
        _, writer = await asyncio.open_connection(request.url.host, request.url.port)
        head = f"POST {request.url.raw_path.decode()} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        writer.write(head.encode())
        writer.close()
        await writer.wait_closed()


def doors_of(misbehaviour: Misbehaviour) -> tuple[str, ...]:
    """The doors through which a mistake can be made."""
    found = ("async",) if misbehaviour.on_loop else ()
    return (*found, "sync", "wsgi") if misbehaviour.in_thread else found
