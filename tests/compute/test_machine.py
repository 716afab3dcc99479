"""What this machine has."""

import pathlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from ooc_ntk.compute import machine
from ooc_ntk.compute.rates import cache_folder

GIB = 2**30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A /proc and /sys of our own: ``system({path: text})`` writes files, with 64 GiB available."""

    class Memory:
        available = 64 * GIB

    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / str(path).lstrip("/"))
    monkeypatch.setattr(psutil, "virtual_memory", Memory)

    def write(files):
        for path, text in files.items():
            file = tmp_path / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


CGROUP = "/sys/fs/cgroup"


class TestFreeHostBytes:
    def test_without_cgroups_what_is_available(self, system):
        assert machine.free_host_bytes() == 64 * GIB

    def test_version_2(self, system):
        system(
            {
                "/proc/self/cgroup": "0::/a/b\n",
                f"{CGROUP}/a/b/memory.max": f"{16 * GIB}\n",
                f"{CGROUP}/a/b/memory.current": f"{3 * GIB}\n",
            }
        )
        assert machine.free_host_bytes() == 13 * GIB

    def test_an_ancestor_may_allow_less(self, system):
        system(
            {
                "/proc/self/cgroup": "0::/a/b\n",
                f"{CGROUP}/a/b/memory.max": "max\n",
                f"{CGROUP}/a/b/memory.current": f"{GIB}\n",
                f"{CGROUP}/a/memory.max": f"{8 * GIB}\n",
                f"{CGROUP}/a/memory.current": f"{3 * GIB}\n",
            }
        )
        assert machine.free_host_bytes() == 5 * GIB

    def test_in_a_container_the_root_is_the_limit(self, system):
        system(
            {
                "/proc/self/cgroup": "0::/\n",
                f"{CGROUP}/memory.max": f"{4 * GIB}",
                f"{CGROUP}/memory.current": f"{5 * GIB}",
            }
        )
        assert machine.free_host_bytes() == 0

    def test_version_1(self, system):
        system(
            {
                "/proc/self/cgroup": "9:cpu:/a\n4:hugetlb,memory:/a\n",
                f"{CGROUP}/memory/a/memory.limit_in_bytes": f"{2 * GIB}",
                f"{CGROUP}/memory/a/memory.usage_in_bytes": f"{GIB}",
                f"{CGROUP}/memory/memory.limit_in_bytes": "9223372036854771712",
                f"{CGROUP}/memory/memory.usage_in_bytes": f"{GIB}",
            }
        )
        assert machine.free_host_bytes() == GIB

    def test_file_cache_that_can_be_given_back_counts_as_free(self, system):
        """A run writes far more than memory holds: its pages fill the cgroup, and are dropped on demand."""
        system(
            {
                "/proc/self/cgroup": "0::/a\n",
                f"{CGROUP}/a/memory.max": f"{16 * GIB}",
                f"{CGROUP}/a/memory.current": f"{15 * GIB}",
                f"{CGROUP}/a/memory.stat": f"anon {3 * GIB}\nactive_file {GIB}\ninactive_file {11 * GIB}\n",
            }
        )
        assert machine.free_host_bytes() >= 12 * GIB


def test_the_sampler_sees_what_comes_and_goes():
    size = 50 * 10**6
    machine.return_free_memory()  # what tests before freed would be used again, unseen
    with machine.PeakSampler() as sampler:
        block = np.ones(size, np.uint8)
        threading.Event().wait(0.05)
        del block
    assert size * 0.95 <= sampler.increase <= size * 1.5
    with machine.PeakSampler() as second:
        pass
    assert second.increase < size / 5, "a second measurement starts anew"


def test_resident_and_peak_bytes():
    block = np.ones(40 * 10**6, np.uint8)
    now = machine.resident_bytes()
    assert now > block.nbytes
    assert machine.peak_resident_bytes() >= now
    status = pathlib.Path("/proc/self/status").read_text()
    (mark,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    assert machine.peak_resident_bytes() >= mark * 0.99


def test_threads_are_limited_and_set_back():
    before = torch.get_num_threads()
    with machine.limited_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), machine.limited_threads(1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_rates_are_named_by_what_they_hold_for():
    assert machine.machine_name("cpu", 2) != machine.machine_name("cpu", 3)
    assert "cpu" in machine.machine_name("cpu", 2)


def test_the_cpu_has_no_device_memory():
    assert machine.device_memory("cpu") == (0, 0)
    assert machine.peak_device_bytes("cpu") == 0
    assert machine.host_to_device_rate("cpu") == 0


def test_children_are_counted_where_they_are_asked_for():
    child = subprocess.Popen([sys.executable, "-c", "import time; x = bytearray(64 << 20); time.sleep(60)"])
    try:
        until = time.monotonic() + 30
        while machine.resident_bytes(children=True) - machine.resident_bytes() < 64 << 20:
            assert time.monotonic() < until
            time.sleep(0.05)
        alone = machine.peak_resident_bytes(children=False)
        assert alone >= machine.resident_bytes() * 0.99
        assert machine.peak_resident_bytes() >= alone + (64 << 20)
    finally:
        child.kill()
        child.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the children of a thread")
def test_other_processes_are_looked_for_only_by_a_process_with_children(monkeypatch):
    looked = []
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: looked.append(recursive) or [])
    if not machine._childless():
        pytest.skip("a process that another test started is still there")
    assert machine.peak_resident_bytes() >= machine.resident_bytes(children=True) * 0.9
    assert looked == []

    def from_a_thread():
        started.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        done.wait()

    started, done = [], threading.Event()
    thread = threading.Thread(target=from_a_thread)
    thread.start()
    try:
        while not started:
            time.sleep(0.01)
        machine.peak_resident_bytes()
        assert looked == [True]
    finally:
        done.set()
        thread.join()
        started[0].communicate(b"\n")


@pytest.mark.parametrize(
    ("platform", "environment", "folder"),
    [
        ("linux", {"OOC_NTK_CACHE": "/a/b"}, Path("/a/b")),
        ("linux", {"XDG_CACHE_HOME": "/x"}, Path("/x/ooc-ntk")),
        ("linux", {}, Path.home() / ".cache" / "ooc-ntk"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, Path.home() / "Library" / "Caches" / "ooc-ntk"),
        ("darwin", {"OOC_NTK_CACHE": "/a/b"}, Path("/a/b")),
    ],
)
def test_rates_are_kept_where_the_system_keeps_such_things(monkeypatch, platform, environment, folder):
    for name in ("OOC_NTK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    assert cache_folder() == folder
