"""Each process answers, on a Unix socket that only its owner may open, what it holds now.

A thread listens from the moment that a session first takes a connection (or `serve()` is called), and sleeps until it
is asked. The folder of the sockets is its owner's alone; the server looks, where the system tells, who asks. It reads
one line, answers with one line, and changes nothing. There are no parameters in it, and no password of a URL.

`DBSCOPE_MONITOR=0` in the environment turns it off; a path there names the folder.
"""

import _thread
import atexit
import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dbscope import lifecycle
from dbscope.errors import ConfigurationError
from dbscope.monitor.snapshot import holdings, pools, without_secrets
from dbscope.where import GREENLETS

__all__ = ["SUFFIX", "VERSION", "folders", "is_ours", "serve", "stop", "uid_of_peer"]

VERSION = 1  # of the answers; what is added later does not change it
SUFFIX = ".sock"
LONGEST = 1000  # bytes of a request
PATIENCE = 2.0  # seconds for all of a request, and as many for its answer
OFF = ("0", "off", "no", "false")
log = logging.getLogger("dbscope.monitor")


class Refused(Exception):
    """A request that is not answered, and why."""


def folders() -> list[Path]:
    """Where a process of this user's may have its socket, the first choice first."""
    chosen = os.environ.get("DBSCOPE_MONITOR", "")
    if os.sep in chosen:
        return [Path(chosen) / "dbscope"]
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    found = [Path(runtime) / "dbscope"] if runtime else []
    found += [Path("/run/user") / str(uid) / "dbscope"]
    found += [Path(root) / f"dbscope-{uid}" for root in (tempfile.gettempdir(), "/tmp")]
    return list(dict.fromkeys(found))


def is_ours(folder: Path) -> bool:
    """Whether a folder is this user's, and nobody else may enter it.

    Raises:
        OSError: there is none, or it is out of reach.
    """
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def serve(folder: Any = None) -> Path:
    """Answer from now on, to those who run as the same user, what this process holds.

    Without this call a process answers from the first connection that a session of it takes. A child of a fork gets a
    socket of its own with its first connection. Calling it again is harmless.

    Args:
        folder: where the socket is to be made, in a folder `dbscope` of its own.

    Returns:
        the path of the socket.

    Raises:
        ConfigurationError: it cannot be made there, or the system has no such sockets.
    """
    with _server.lock:
        if folder is not None:
            _server.chosen = [Path(folder) / "dbscope"]
        _server.off = False
        return _server.path or _server.open()


def stop() -> None:
    """Answer no longer, and remove the socket. `serve()` begins again."""
    with _server.lock:
        _server.off = True
        _server.close()


class _Server:
    """The socket of this process, and the thread that listens to it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.chosen: list[Path] = []
        self.off = False
        self.path: Path | None = None
        self.since = time.time()
        self._listening: socket.socket | None = None
        self._pid = os.getpid()

    def arm(self) -> None:
        """Let the core begin this with the next connection that a session takes."""
        if self.wake not in lifecycle.sleepers:
            lifecycle.sleepers.append(self.wake)

    def wake(self) -> None:
        """A connection was taken: that of whoever waits for it is not to wait for this."""
        if self.path is None and not self.off and os.environ.get("DBSCOPE_MONITOR", "").lower() not in OFF:
            try:
                _start(self._begin)
            except RuntimeError:  # the system has no thread to give, or the interpreter ends
                self.arm()

    def _begin(self) -> None:
        with self.lock:
            if self.path is not None or self.off:
                return
            try:
                self._listen()
            except Exception as error:  # a read-only file system, say; nobody has asked for it
                log.debug("this process answers no dbscope top: %s", error)
                return
        self._run()

    def open(self) -> Path:
        """Listen, in a thread of its own."""
        path = self._listen()
        _start(self._run)
        return path

    def _listen(self) -> Path:
        if not hasattr(socket, "AF_UNIX") or not hasattr(os, "geteuid"):
            raise ConfigurationError("dbscope.monitor needs Unix sockets, which this system, or its Python, has not.")
        failures = []
        for folder in self.chosen or folders():
            self._listening = socket.socket(socket.AF_UNIX)  # known before it listens, and so to a child of a fork
            try:
                self.path = _bind(self._listening, folder)
            except OSError as error:
                self._listening = None
                failures.append(f"{folder}: {error.strerror or error}")
                continue
            self._pid = os.getpid()
            return self.path
        raise ConfigurationError(
            "a socket for dbscope.monitor cannot be made: " + "; ".join(failures) + ".\n"
            "Name a folder of this user's: `dbscope.monitor.serve(folder)`, or DBSCOPE_MONITOR=/the/folder."
        )

    def _run(self) -> None:
        listening = self._listening
        while listening is not None and listening is self._listening:
            try:
                asking, _ = listening.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.ENOMEM):
                    threading.Event().wait(1)  # the process is out of files; that may pass
                    continue
                break
            with asking:
                if listening is self._listening:
                    with contextlib.suppress(OSError):  # it has hung up
                        _answer(asking, self.since)
        if listening is not None:
            listening.close()

    def close(self) -> None:
        """Remove the socket, and end the thread."""
        path, self.path, self._listening = self.path, None, None
        if path is not None and self._pid == os.getpid():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as knock:
                knock.settimeout(PATIENCE)
                knock.connect(str(path))  # for the thread to look up
            with contextlib.suppress(OSError):
                path.unlink()

    def after_fork(self) -> None:
        """In the child: the socket is the parent's, and would be answered by nobody if the parent went."""
        self.lock = threading.Lock()
        if self._listening is not None:
            self._listening.close()
        self._listening = self.path = None
        self.since = time.time()
        self.arm()


def _start(target: Callable[[], None]) -> None:
    if GREENLETS:  # a child of a fork has a copy of the greenlet, and threading would miss it when it ends there
        _thread.start_new_thread(target, ())
    else:
        threading.Thread(target=target, name="dbscope-monitor", daemon=True).start()


def _bind(listening: socket.socket, folder: Path) -> Path:
    """Have a socket listen in the folder, by a name that nobody else has; it is closed if that fails."""
    hidden: Path | None = None
    try:
        _make_ours(folder)
        remove_stale(folder)
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        # As long as each other: a path has some hundred bytes at most, and to be renamed to is not refused.
        hidden, path = folder / f".{name}{SUFFIX[1:]}", folder / f"{name}{SUFFIX}"
        listening.bind(str(hidden))
        hidden.chmod(0o600)
        listening.listen(16)
        hidden.rename(path)  # who finds it finds it listening
    except BaseException:
        listening.close()
        with contextlib.suppress(OSError):
            if hidden is not None:
                hidden.unlink()
        raise
    return path


def _make_ours(folder: Path) -> None:
    """Make the folder, if there is none, so that nobody else may enter it.

    Raises:
        OSError: it cannot be made, or is not so.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(0o700)  # whatever the folder around it hands down
    if not is_ours(folder):
        raise PermissionError(errno.EPERM, "it is another user's, or others may enter it (chmod 700)")


def remove_stale(folder: Path) -> None:
    """Remove the sockets of processes that were killed, where their numbers are nobody's now."""
    for path in [*folder.glob(f"*{SUFFIX}"), *folder.glob(".*-*")]:
        number = path.name.lstrip(".").partition("-")[0]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            if nobody_listens(path):
                with contextlib.suppress(OSError):
                    path.unlink()
        except (OSError, ValueError, OverflowError):
            continue


def nobody_listens(path: Path) -> bool:
    """Whether a socket's process is gone. In another container it may live although its number is nobody's here."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PATIENCE)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def uid_of_peer(connected: socket.socket) -> tuple[int, int] | None:
    """The process and the user at the other end of a socket, where the system tells."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    pid, uid, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def _answer(asking: socket.socket, since: float) -> None:
    """Answer one request, be it a bad one."""
    answer = ""
    try:
        peer = uid_of_peer(asking)
        if peer is not None and peer[1] not in (os.geteuid(), 0):
            raise Refused(f"only user {os.geteuid()}, whose process this is, may ask")
        _understand(_line(asking))
        answer = json.dumps(_told(since), default=str)  # a scope may be named by a UUID
        problem = None
    except Refused as refusal:
        problem = str(refusal)
    except Exception as error:
        log.exception("what this process holds could not be told")
        problem = f"{type(error).__name__} in process {os.getpid()}: see its log"
    if problem is not None:
        answer = json.dumps({"version": VERSION, "error": problem})
    asking.settimeout(PATIENCE)
    asking.sendall(answer.encode() + b"\n")
    if problem is not None:
        _drain(asking)


def _drain(asking: socket.socket) -> None:
    """Read what is left of a bad request: closed before, the socket would take the answer away from who sent it."""
    asking.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        asking.settimeout(left)
        if not asking.recv(65536):
            break


def _line(asking: socket.socket) -> bytes:
    """The request: what comes before the first line's end, in time."""
    deadline, said = time.monotonic() + PATIENCE, b""
    while b"\n" not in said:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Refused(f"a request has {PATIENCE:g} seconds to arrive")
        asking.settimeout(left)
        try:
            more = asking.recv(LONGEST)
        except TimeoutError:
            continue
        if not more:
            raise Refused("a request is a line, with its end")
        said += more
        if len(said) > LONGEST:
            raise Refused(f"a request has at most {LONGEST} bytes")
    line, _, rest = said.partition(b"\n")
    if rest:
        raise Refused("a request is one line")
    return line


def _understand(line: bytes) -> None:
    """Raise unless the line asks for what there is."""
    example = '{"ask": "holdings"}'
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise Refused(f"a request is JSON, such as {example}") from None
    if not isinstance(request, dict) or request.get("ask") != "holdings" or len(request) > 1:
        raise Refused(f"there is one request: {example}")


def _told(since: float) -> dict[str, Any]:
    """What this process holds now."""
    held = [asdict(holding) for holding in holdings()]
    pooled = [asdict(pool) for pool in pools()]
    for told in (*held, *pooled):
        told["database"] = without_secrets(told["database"])
    return {
        "version": VERSION,
        "process": os.getpid(),
        "program": _program(),
        "since": since,
        "at": time.time(),
        "pools": pooled,
        "holdings": held,
    }


def _program() -> str:
    """What runs here, without its arguments, which may hold secrets."""
    path = Path(getattr(sys, "argv", [""])[0] or "python")
    return path.parent.name if path.name == "__main__.py" else path.name


def sockets() -> Iterator[Path]:
    """The sockets of this user's processes."""
    for folder in folders():
        with contextlib.suppress(OSError):
            if is_ours(folder):
                yield from sorted(folder.glob(f"*{SUFFIX}"))


_server = _Server()
_server.arm()
atexit.register(_server.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_server.after_fork)
