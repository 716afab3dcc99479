"""The benchmark of projections on a GPU checks itself at tiny sizes, wherever it runs. Nothing is timed."""

import pytest
import torch

from bench import gpu_projection
from ooc_ntk.compute.machine import limited_threads


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_smoke(backend, capsys):
    with limited_threads(1):  # more threads than free cores would make tiny products take minutes
        gpu_projection.main(["--smoke", "--backend", backend])
    text = capsys.readouterr().out
    assert "as defined, bit for bit" in text
    assert "two runs give the same bits" in text
    for line in (
        "copy on the device",
        "scatter of sjlt, kept table",
        "features as runs make them, sjlt",
        "tile and product",
    ):
        assert line in text
    assert "left out" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, which would be measured")
def test_without_a_device_nothing_is_measured(capsys):
    gpu_projection.main([])
    assert capsys.readouterr().out == "no CUDA device: not measured\n"


def test_a_wrong_entry_of_r_is_found(monkeypatch):
    setting = gpu_projection.Setting("cpu", "torch", True).small()
    backend = gpu_projection.load_backend("torch")
    table = backend.table

    def wrong(projection, p, outers):
        found = table(projection, p, outers)
        found[0, -1] += 1
        return found

    monkeypatch.setattr(backend, "table", wrong)
    with pytest.raises(AssertionError, match=r"table of (sjlt|shift): 1 of .* entries of R differ"):
        gpu_projection.check_entries(backend, setting)
