"""Two machines in one: network namespaces with their own addresses and host names, joined by a cable that can be cut.

The processes share everything else, such as the files and the clock. It needs Linux, root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

NAMES = ("a", "b")
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
PORT = 29500  # of torchrun's rendezvous, in a namespace of its own
KNOWN = "".join(f"{address} machine-{name}\n" for name, address in ADDRESSES.items())
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


class Network:
    """The two machines, as a context; `b` leaves by unplug() and comes back by plug()."""

    def __init__(self, folder: Path, hosts: str = KNOWN):
        self.spaces = {name: f"finetune{os.getpid()}{name}" for name in NAMES}
        self.hosts = folder / "hosts"
        self.hosts.write_text(f"127.0.0.1 localhost\n{hosts}")

    def __enter__(self) -> Network:
        for space in self.spaces.values():
            ip("netns", "add", space)
        try:
            one, other = self.spaces.values()
            ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
            for name, space in self.spaces.items():
                ip("-n", space, "address", "add", f"{ADDRESSES[name]}/24", "dev", "cable")
                ip("-n", space, "link", "set", "lo", "up")
            self.plug()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        for space in self.spaces.values():
            ip("netns", "delete", space)

    def unplug(self) -> None:
        """Cut the cable: what is sent is lost, without an error to anyone."""
        ip("-n", self.spaces["b"], "link", "set", "cable", "down")

    def plug(self) -> None:
        for space in self.spaces.values():
            ip("-n", space, "link", "set", "cable", "up")

    def on(self, name: str, command: list[str]) -> list[str]:
        """Return the command that runs `command` on a machine."""
        enter = ["ip", "netns", "exec", self.spaces[name], "unshare", "--uts", "sh", "-c", ENTER, "sh"]
        return [*enter, str(self.hosts), f"machine-{name}", *command]


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def missing(folder: Path) -> str:
    """Return why there can be no such machines here; "" if there can."""
    for program in ("ip", "unshare", "mount", "hostname"):
        if shutil.which(program) is None:
            return f"no program {program}"
    try:
        with Network(folder) as network:
            done = subprocess.run(network.on("b", ["true"]), capture_output=True, text=True)
            return f"no network namespace: {done.stderr.strip()}" if done.returncode else ""
    except OSError as error:
        return f"no network namespaces: {error}"
