"""Several machines in one run: the network between them, and the software that each of them has."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy
import safetensors
import tokenizers
import torch

import data
import models
from data.writing import WRITING
from engine.config import ConfigError

INTERFACE = "GLOO_SOCKET_IFNAME"  # environment variable: the network interface that gloo uses
ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of Linux
BLOCK, MAX_BLOCKS = 1 << 14, 256  # bytes, of a file that is sampled; a file of 4 MB is read as a whole


def are_several() -> bool:
    """Return whether torchrun has started this run on several machines, or by several torchruns on one."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") != "1"


def choose_interface(master: str) -> str:
    """Make gloo use the network that leads to the machine of the store; return this machine's address there.

    Otherwise gloo would use the address that this machine's own name has, which is often one that only it can reach.
    Does nothing and returns "" where GLOO_SOCKET_IFNAME is set, or on another system than Linux.
    """
    if os.environ.get(INTERFACE) or not sys.platform.startswith("linux"):
        return ""
    own = find_own_address(master)
    for _, name in socket.if_nameindex():
        if not is_loopback(own) and address_of(name) == own:
            os.environ[INTERFACE] = name
    return own


def is_loopback(address: str) -> bool:
    """Return whether an address is one that only its own machine can reach."""
    return address.startswith("127.")


def check_reachable(who: str, own: str, others: Iterable[str]) -> None:
    """Raise ConfigError where this machine knows only a loopback address of itself, and another one does not."""
    if is_loopback(own) and any(other and not is_loopback(other) for other in others):
        raise ConfigError(
            f"{who}: MASTER_ADDR = {os.environ.get('MASTER_ADDR')!r} is {own} there, which no other machine can reach: "
            f"give torchrun there the machine's address with --local-addr, or name its network interface in {INTERFACE}"
        )


def find_own_address(other: str) -> str:
    """Return the IPv4 address from which this machine reaches another one; "" where there is none. Nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])
    return ""


def address_of(interface: str) -> str:
    """Return the first IPv4 address of a network interface; "" if it has none."""
    import fcntl  # which not every system has

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, ADDRESS_OF_INTERFACE, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return ""


def explain_unreachable(host: str) -> str:
    """Return a phrase on why this machine cannot reach another one, where that is known."""
    try:
        found = socket.gethostbyname(host)
    except OSError:
        return f", since this machine does not know the name {host!r}: give torchrun --local-addr there"
    if are_several() and is_loopback(found):
        return f", since {host!r} is {found} here, this machine itself: give torchrun --local-addr there"
    return ""


def read_software() -> dict[str, str]:
    """Return the versions of what computes a run, and a checksum of the engine's own source."""
    packages = {module.__name__: module.__version__ for module in (torch, numpy, tokenizers, safetensors)}
    versions = {f"the version of {name}": str(version) for name, version in packages.items()}
    root = Path(models.__file__).parent.parent
    files = [
        path for package in (__file__, models.__file__, data.__file__) for path in Path(package).parent.rglob("*.py")
    ]
    source = hashlib.sha256()
    for path in sorted(files):
        source.update(f"{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
    return versions | {
        "the version of Python": platform.python_version(),
        "the checksum of the engine's source": source.hexdigest()[:16],
    }


def sample_checksum(paths: Iterable[Path]) -> str:
    """Return a checksum of the names and sizes of files, and of 256 blocks of 16 KiB of each, evenly spaced.

    It tells checkpoints apart, whose tensors all differ, without reading gigabytes.
    """
    total = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        total.update(f"{path.name} {size} ".encode())
        with path.open("rb") as stream:
            for i in range(min(MAX_BLOCKS, -(-size // BLOCK))):
                stream.seek(i * BLOCK if size <= MAX_BLOCKS * BLOCK else i * (size - BLOCK) // (MAX_BLOCKS - 1))
                total.update(stream.read(BLOCK))
    return total.hexdigest()[:16]


def describe_checkpoint(folder: Path) -> dict[str, str]:
    """Return a checksum of the weights, tokenizer and configuration in a folder, to compare; {} for a single rank."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return {}
    names = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model")
    files = [path for name in names for path in folder.glob(name) if path.is_file()]
    return {"the checksum of the pretrained checkpoint": sample_checksum(files)}


def write_token(folder: str) -> str:
    """Write an empty file of a new name into a folder; return its name. ConfigError where it cannot be written."""
    name = f"{WRITING}{secrets.token_hex(8)}"
    try:
        (Path(folder) / name).touch()
    except OSError as error:
        raise ConfigError(f"{folder!r} cannot be written: {error.strerror}") from None
    return name
