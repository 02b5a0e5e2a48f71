"""Hosts beside this one: network namespaces, each with an address of its own, and a cable to here."""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support import needs

_cables = itertools.count()


@dataclass(frozen=True)
class Host:
    """A host, and how a program is started on it.

    Attributes:
        name: of the namespace.
        address: its own, at which this host reaches it.
        gateway: this host's, at which it reaches us.
    """

    name: str
    address: str
    gateway: str

    @property
    def prefix(self) -> list[str]:
        """What comes before a command that is to run there."""
        return ["ip", "netns", "exec", self.name]


@contextlib.contextmanager
def hosts(number: int) -> Iterator[list[Host]]:
    """Some hosts; they are gone when the block is left. Needs root, and a kernel that lets it."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        needs.spare("network namespaces need `ip` and root")
    own = os.getpid() % 200  # tests run side by side
    made = [
        Host(f"dbscope-{os.getpid()}-{index}", f"10.{200 + index}.{own}.2", f"10.{200 + index}.{own}.1")
        for index in range(number)
    ]
    with contextlib.ExitStack() as stack:
        for host in made:
            try:
                _ip("netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                needs.spare(f"no network namespaces here: {error.stderr.strip()}")
            stack.callback(_ip, "netns", "del", host.name)
            cable = next(_cables)  # that of a host that is gone may stay for a moment
            here, there = (f"db{os.getpid()}{end}{cable}" for end in "ht")  # at most 15 characters
            _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", host.name)
            _ip("addr", "add", f"{host.gateway}/24", "dev", here)
            _ip("link", "set", here, "up")
            for command in (("addr", "add", f"{host.address}/24", "dev", there), ("link", "set", there, "up")):
                _ip("-n", host.name, *command)
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield made


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
