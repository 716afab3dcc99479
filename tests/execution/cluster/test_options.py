"""Which workers are asked for, refused where they cannot be had; and processes that see one device each."""

import os

import pytest
import torch
from distributed import Client

from ooc_ntk.errors import InputError
from ooc_ntk.execution.cluster.options import Cluster
from ooc_ntk.execution.cluster.start import PinnedCluster, visible
from ooc_ntk.execution.executors import executor_of


@pytest.fixture
def two_devices(monkeypatch):
    """Two CUDA devices, as far as counting them goes."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "got none of them"),
        ({"workers": 2, "scheduler": "tcp://host:8786"}, "got scheduler and workers"),
        ({"workers": 0}, "whole number from 1 to 1024, got 0"),
        ({"workers": 1025}, "got 1025"),
        ({"workers": 2.0}, "got 2.0"),
        ({"workers": True}, "got True"),
        ({"scheduler": "host:8786"}, "'host:8786' is no address .*'tcp://host:8786'"),
        ({"scheduler": "http://host:8786"}, "no address"),
        ({"scheduler": "tcp://"}, "no address"),
        ({"workers": 2, "patience": 0}, "patience must be a positive number of seconds, got 0"),
        ({"workers": 2, "patience": float("nan")}, "patience"),
        ({"workers": 2, "performance_report": "nowhere/report.html"}, "report nowhere/report.html cannot be written"),
        ({"workers": 2, "performance_report": "."}, "name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_had_is_refused(asked, words):
    with pytest.raises(InputError, match=words):
        Cluster(**asked)


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [("all", (0, 1)), ("0,1", (0, 1)), ("1, 0", (1, 0)), ("1,1", (1,)), (1, (1,)), ([0, 1], (0, 1)), ((1,), (1,))],
)
def test_devices_in_every_spelling(two_devices, asked, numbers):
    cluster = Cluster(devices=asked)
    assert cluster.devices == numbers
    assert cluster.processes == len(numbers)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("2", "no CUDA device 2; torch sees 0 to 1"),
        ("0,-1", "no CUDA device -1"),
        ("", "'all' or numbers"),
        ("every", "'all' or numbers as '0,2', got 'every'"),
        ([], "no CUDA device"),
        (1.5, "'all' or numbers"),
    ],
)
def test_devices_that_are_not_there(two_devices, asked, words):
    with pytest.raises(InputError, match=words):
        Cluster(devices=asked)


def test_without_a_device_the_processor_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"torch sees none here; use workers=\.\.\. \(--workers\)"):
        Cluster(devices="all")


def test_processes_that_share_this_machine():
    assert Cluster(workers=3).processes == 3
    assert Cluster("tcp://host:8786").processes == 1, "those of a cluster elsewhere have memory of their own"
    assert executor_of("tcp://host:8786").processes == 1
    assert executor_of(Cluster(workers=3)).processes == 3
    assert executor_of("serial").processes == executor_of(None).processes == 0


@pytest.mark.parametrize(
    ("shown", "numbers", "names"),
    [
        (None, (0, 2), ["0", "2"]),
        ("", (0, 1), ["0", "1"]),
        ("4,7", (1, 0), ["7", "4"]),
        ("GPU-8932f937, GPU-1f22e4a4", (0, 1), ["GPU-8932f937", "GPU-1f22e4a4"]),
        ("MIG-7f2c", (0,), ["MIG-7f2c"]),
    ],
)
def test_a_device_of_this_process_as_others_would_name_it(shown, numbers, names):
    assert visible(numbers, {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}) == names


def _seen():
    return os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"]


@pytest.mark.slow
def test_each_process_sees_its_own_device_also_when_it_is_begun_again(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,9")
    options = {
        "threads_per_worker": 1,
        "memory_limit": 0,
        "dashboard_address": "127.0.0.1:0",
        "env": {"OMP_NUM_THREADS": "1"},
    }
    with PinnedCluster((0, 2), **options) as cluster, Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        before = client.run(_seen)
        assert sorted(before.values()) == [("5", "1"), ("9", "1")]
        first = next(address for address, seen in before.items() if seen[0] == "5")
        client.restart_workers([first], timeout=60)
        client.wait_for_workers(2, timeout=60)
        assert sorted(client.run(_seen).values()) == [("5", "1"), ("9", "1")]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,3,9"
