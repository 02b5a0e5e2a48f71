"""A Redis that needs no server: fakeredis's, which answers other processes, too."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tests.support import needs


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """The URL of an empty Redis in a thread of this process, until the end of the block."""
    needs.package("fakeredis")
    from fakeredis import TcpFakeServer
    from redis.exceptions import ResponseError

    server = TcpFakeServer(("127.0.0.1", 0))
    handler: Any = server.RequestHandlerClass

    class Handler(handler):  # type: ignore[misc]
        def setup(self) -> None:
            super().setup()
            client = self.current_client
            info = client.get_socket()._client_info
            for key in ("addr", "laddr"):  # which fakeredis leaves a tuple, and RQ's client cannot read
                info[key] = "{}:{}".format(*info[key])
            read = client.read_response

            def read_response(*args: Any, **options: Any) -> Any:
                try:
                    return read(*args, **options)
                except ResponseError as error:  # an answer, on which fakeredis hangs up
                    return b"redis_version:8.0.0\r\n" if "'info'" in str(error) else error

            client.read_response = read_response

    server.RequestHandlerClass = Handler
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="redis")
    thread.start()
    try:
        yield "redis://{}:{}".format(*server.server_address)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
