"""PgBouncer in transaction mode: each transaction of its clients gets whichever server connection is free."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

from sqlalchemy.engine import make_url

from tests.support.postgres import free_port

START_LIMIT = 30.0


class PgBouncerNotFound(Exception):
    """There is no PgBouncer on this machine."""


def find_pgbouncer() -> str:
    """Return the program; raise `PgBouncerNotFound`."""
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")  # not in every user's path
    if found is None:
        raise PgBouncerNotFound("pgbouncer is not installed (Debian: apt-get install pgbouncer)")
    return found


class PgBouncer:
    """A running pooler in front of the server of a URL, for one `with` block.

    Each database gets `pool_size` server connections; clients come from `address`'s networks.
    """

    def __init__(self, url: str, *, address: str = "127.0.0.1", pool_size: int = 1, mode: str = "transaction") -> None:
        self._address = address
        self._pool_size = pool_size
        self._mode = mode
        self._program = find_pgbouncer()
        self._server = make_url(url)
        self.port = free_port()

    def __enter__(self) -> Self:
        self._home = Path(tempfile.mkdtemp(prefix="dbscope-pgbouncer-"))
        command = [self._program, "--quiet", str(self._home / "pgbouncer.ini")]
        if shutil.which("setpriv"):
            command = ["setpriv", "--pdeathsig=TERM", *command]
        if os.geteuid() == 0:  # it refuses to be root
            nobody = pwd.getpwnam("nobody")
            command = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", *command]
            os.chown(self._home, nobody.pw_uid, nobody.pw_gid)
        (self._home / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={self._server.host} port={self._server.port} user=postgres\n"
            f"[pgbouncer]\nlisten_addr = {self._address}\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = any\npool_mode = {self._mode}\ndefault_pool_size = {self._pool_size}\n"
            "ignore_startup_parameters = extra_float_digits\n"
        )
        log = self._home / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + START_LIMIT
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError("PgBouncer did not start")
            time.sleep(0.02)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0
