"""A TCP proxy in front of PostgreSQL that cuts a connection around its COMMIT, as networks do at the worst moment."""

import selectors
import socket
import threading
from enum import Enum
from typing import Self

COMMIT = b"COMMIT"  # in a message of its own, from every driver
READY = b"Z"  # ReadyForQuery, with which each answer ends: a type, a length and a state, of 6 bytes together
LIMIT = 30.0  # only a test that fails waits so long


class Cut(Enum):
    """Where the connection is cut."""

    BEFORE = "the COMMIT does not reach the server"
    BETWEEN = "it is sent to the server, and nobody waits for the answer"
    ANSWERED = "the server has answered, and the answer does not reach the client"


class Proxy:
    """Passes bytes on between clients and a server on this machine, for one `with` block."""

    def __init__(self, port: int) -> None:
        """To the server's port."""
        self.server = port
        self.away = False  # as if the server could not be reached: new connections are closed at once
        self.cuts = 0
        self._cut: Cut | None = None
        self._delivered = 0
        self._then: int | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._over = False
        self._accepting = threading.Thread(target=self._accept, name="proxy")
        self._passing: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        socket.create_connection(("127.0.0.1", self.port)).close()  # wakes the listener
        for thread in [self._accepting, *self._passing]:
            thread.join(LIMIT)
            assert not thread.is_alive(), "a connection through the proxy is still open"
        self._listener.close()

    def cut(self, where: Cut, *, delivered: int = 0, then: int | None = None) -> None:
        """Cut the connection that sends the next COMMIT.

        Args:
            where: at which moment.
            delivered: how many bytes of the answer the client gets nevertheless.
            then: the port of another server to which new connections are passed from then on.
        """
        self._cut, self._delivered, self._then = where, delivered, then

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._over or self.away:
                client.close()
                if self._over:
                    return
                continue
            server = socket.create_connection(("127.0.0.1", self.server))
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._passing = [thread for thread in self._passing if thread.is_alive()]
            self._passing.append(threading.Thread(target=self._pass_on, args=(client, server), name="proxied"))
            self._passing[-1].start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while True:
                for key, _ in ready.select():
                    source = client if key.fileobj is client else server
                    try:
                        data = source.recv(65536)
                        if not data:
                            return
                        if source is client and COMMIT in data and self._cut is not None:
                            self._carry_out(data, client, server)
                            return
                        key.data.sendall(data)
                    except OSError:  # one side is gone
                        return

    def _carry_out(self, commit: bytes, client: socket.socket, server: socket.socket) -> None:
        cut, self._cut = self._cut, None
        self.cuts += 1
        if self._then is not None:
            self.server = self._then
        if cut is not Cut.BEFORE:
            server.sendall(commit)
        if cut is Cut.ANSWERED:
            answer = b""
            while answer[-6:-5] != READY:
                answer += server.recv(65536)
            client.sendall(answer[: self._delivered])
