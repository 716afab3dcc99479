"""How torch is set up for a device; what a user has set stays."""

import os
import sys

import pytest
import torch

from ooc_ntk.compute import device as device_module
from ooc_ntk.compute.device import ALLOCATOR_VARIABLES, CUBLAS_VARIABLE, deterministic_device, set_up_device


@pytest.fixture
def allocator(monkeypatch):
    """An allocator that notes its settings; ``allocator[0]`` is what was set from Python before."""
    found = [""]
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: found[0], raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append, raising=False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(sys, "platform", "linux")
    for name in (*ALLOCATOR_VARIABLES, CUBLAS_VARIABLE):
        # Set first, so that it is put back as it was whatever is set meanwhile.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return found


def test_segments_expand_and_cublas_is_deterministic(allocator):
    set_up_device("cuda:0")
    assert allocator[1:] == ["expandable_segments:True"]
    assert os.environ[CUBLAS_VARIABLE] == ":4096:8"


def test_a_cpu_is_left_alone(allocator):
    set_up_device("cpu")
    assert allocator == [""]
    assert CUBLAS_VARIABLE not in os.environ


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_what_a_user_has_set_stays(name, allocator, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    set_up_device("cuda")
    assert allocator == [""]
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"


def test_what_was_set_from_python_stays(allocator):
    allocator[0] = "max_split_size_mb:512"
    set_up_device("cuda")
    assert len(allocator) == 1


@pytest.mark.parametrize(("where", "what"), [("platform", "win32"), ("backend", "cudaMallocAsync")])
def test_where_segments_cannot_expand(where, what, allocator, monkeypatch):
    if where == "platform":
        monkeypatch.setattr(sys, "platform", what)
    else:
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: what)
    set_up_device("cuda")
    assert allocator == [""]


def test_an_allocator_that_refuses_is_used_as_it_is(allocator, monkeypatch, caplog):
    def refuse(settings):
        raise RuntimeError("too late")

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", refuse, raising=False)
    with caplog.at_level("INFO", device_module.__name__):
        set_up_device("cuda")
    assert "too late" in caplog.text


def test_an_earlier_torch(allocator, monkeypatch):
    for name in ("_accelerator_getAllocatorSettings", "_accelerator_setAllocatorSettings"):
        monkeypatch.delattr(torch._C, name)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", allocator.append)
    set_up_device("cuda")
    assert allocator[1:] == ["expandable_segments:True"]


def test_flags_are_set_and_set_back():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def flags():
        return cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction

    cudnn.benchmark = True
    try:
        before = flags()
        with deterministic_device():
            assert flags() == (True, False, False)
        assert flags() == before
    finally:
        cudnn.benchmark = False
