"""What the ranks compare and choose where they are on several machines; tests/machines has whole runs."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
from support.runs import CPU

from engine import distributed, machines
from engine.config import ConfigError
from engine.distributed import Ranks

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the call is Linux's")


@pytest.fixture
def several(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.delenv(machines.INTERFACE, raising=False)


@LINUX
def test_the_interface_is_the_one_with_the_address(several, monkeypatch):
    monkeypatch.setattr(machines, "find_own_address", lambda master: "10.0.0.7")
    monkeypatch.setattr(machines.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    addresses = {"lo": "127.0.0.1", "eth0": "192.168.0.7", "ib0": "10.0.0.7"}
    monkeypatch.setattr(machines, "address_of", addresses.get)
    assert machines.choose_interface("10.0.0.1") == "10.0.0.7"
    assert os.environ.pop(machines.INTERFACE) == "ib0"


@LINUX
def test_a_loopback_address_chooses_no_interface(several):
    assert machines.address_of("lo") == "127.0.0.1"
    assert machines.choose_interface("127.0.0.1") == "127.0.0.1"
    assert machines.INTERFACE not in os.environ


def test_the_users_interface_is_kept(several, monkeypatch):
    monkeypatch.setenv(machines.INTERFACE, "ib1")
    assert machines.choose_interface("127.0.0.1") == ""
    assert os.environ[machines.INTERFACE] == "ib1"


@pytest.mark.parametrize("name", ["no.such.host.invalid", "::1"])
def test_a_machine_without_a_route_has_no_address(name):
    assert machines.find_own_address(name) == ""


def test_loopback_is_refused_where_another_machine_has_none(several, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    machines.check_reachable("rank 0 (machine a)", "127.0.1.1", ["127.0.1.1", "127.0.0.1", ""])
    machines.check_reachable("rank 0 (machine a)", "10.0.0.1", ["10.0.0.1", "127.0.0.1"])
    with pytest.raises(
        ConfigError, match=r"^rank 0 \(machine a\): MASTER_ADDR = 'node1' is 127.0.1.1 there, .*--local-a"
    ):
        machines.check_reachable("rank 0 (machine a)", "127.0.1.1", ["127.0.1.1", "10.0.0.2"])


def test_why_a_host_is_not_reached_is_said(several):
    assert "does not know the name 'no.such.host.invalid'" in machines.explain_unreachable("no.such.host.invalid")
    assert "is 127.0.0.1 here, this machine itself" in machines.explain_unreachable("localhost")
    assert machines.explain_unreachable("10.0.0.1") == ""


def test_the_software_has_versions_and_a_checksum_of_the_source():
    software = machines.read_software()
    assert {"the version of torch", "the version of Python", "the checksum of the engine's source"} <= software.keys()
    assert software == machines.read_software()


def test_a_sample_tells_files_apart(tmp_path):
    """Names, sizes, a small file as a whole, a large one by blocks from its first byte to its last."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"abc")
    with large.open("wb") as stream:
        stream.truncate(100 << 20)
    seen = {machines.sample_checksum([small, large])}
    assert machines.sample_checksum([large, small]) in seen
    for place in (0, (100 << 20) - 1):
        with large.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        seen.add(machines.sample_checksum([small, large]))
    small.write_bytes(b"abd")
    seen.add(machines.sample_checksum([small, large]))
    small.rename(tmp_path / "other")
    seen.add(machines.sample_checksum([tmp_path / "other", large]))
    assert len(seen) == 5


def test_only_several_ranks_compare_their_checkpoints(monkeypatch, checkpoint_folder, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert machines.describe_checkpoint(checkpoint_folder) == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    own = machines.describe_checkpoint(checkpoint_folder)
    copy = shutil.copytree(checkpoint_folder, tmp_path / "another name")
    assert machines.describe_checkpoint(copy) == own
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text().replace("film", "movie"))
    assert machines.describe_checkpoint(copy) != own


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_folder_that_a_machine_does_not_see_is_refused(several, monkeypatch, tmp_path, is_shared):
    monkeypatch.setattr(distributed, "all_gather", lambda value: [value, is_shared])
    if is_shared:
        distributed.check_shared_folder("run.folder", str(tmp_path), CPU)
    else:
        with pytest.raises(
            ConfigError, match=r"^run.folder of rank 1 is not the folder of rank 0, .*: all machines need"
        ):
            distributed.check_shared_folder("run.folder", str(tmp_path), CPU)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_one_machine_is_not_checked(monkeypatch, tmp_path):
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    distributed.check_shared_folder("run.folder", str(tmp_path / "missing"), Ranks(1, 2, CPU.device))


def test_a_folder_that_cannot_be_written_is_said(several, tmp_path):
    with pytest.raises(ConfigError, match="missing' cannot be written: No such file"):
        distributed.check_shared_folder("run.folder", str(tmp_path / "missing"), CPU)
