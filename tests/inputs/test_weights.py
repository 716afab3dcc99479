import collections
import logging

import pytest
import safetensors.torch
import torch
from torch import nn

from ooc_ntk.errors import InputError, StorageError
from ooc_ntk.inputs.weights import apply_weights, load_weights, save_weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("part", torch.arange(10.0)[2:8].reshape(2, 3).t())


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("ending", ["pt", "pth", "bin"])
def test_pickled_state_dicts(tmp_path, ending):
    state = nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / f"w.{ending}")
    assert same(load_weights(tmp_path / f"w.{ending}"), state)
    torch.save({"epoch": 3, "state_dict": state}, str(tmp_path / f"n.{ending}"))
    assert same(load_weights(tmp_path / f"n.{ending}"), state)


def test_a_prefix_on_every_name_is_dropped_and_logged(tmp_path, caplog):
    state = nn.Linear(3, 2).state_dict()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, logger="ooc_ntk"):
        assert same(load_weights(tmp_path / "w.pt"), state)
    assert "'module.' dropped" in caplog.text
    torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "w.pt")
    assert sorted(load_weights(tmp_path / "w.pt")) == ["b", "module.a"]


def test_safetensors_with_tied_and_overlapping_tensors_round_trip(tmp_path):
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "w.safetensors")
    state = load_weights(tmp_path / "w.safetensors")
    assert sorted(state) == ["embedding.weight", "part"]
    other.part += 1
    apply_weights(other, state)
    assert same(other.state_dict(), model.state_dict())
    assert other.head.weight is other.embedding.weight
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
    apply_weights(other, model.state_dict())


def test_tied_names_with_different_values_are_refused():
    state = {name: value.clone() for name, value in Tied().state_dict().items()}
    state["head.weight"] += 1
    with pytest.raises(InputError, match=r"embedding.weight and head.weight differ"):
        apply_weights(Tied(), state)


def test_mismatches_are_counted_and_the_first_five_named():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"8 missing: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 3 more"):
        apply_weights(model, {})
    state = {**before, "extra": torch.zeros(1), "0.weight": torch.zeros(2, 9)}
    with pytest.raises(
        InputError, match=r"1 unexpected: extra; 1 of another shape: 0.weight \(2, 9\), model has \(2, 2\)"
    ):
        apply_weights(model, state)
    assert same(model.state_dict(), before)


def test_casts_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="ooc_ntk"):
        apply_weights(nn.Linear(1, 1), nn.Linear(1, 1).double().state_dict())
    assert "cast to the dtype of the model: weight, bias" in caplog.text


def test_files_with_code_are_never_run(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"more than tensors.*model.state_dict\(\)"):
        load_weights(tmp_path / "model.pt")
    torch.save({"state_dict": {}, "sampler": collections.Counter, "path": tmp_path}, tmp_path / "mixed.pt")
    with pytest.raises(InputError, match="more than tensors"):
        load_weights(tmp_path / "mixed.pt")


def test_bad_files_are_refused_with_a_reason(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello world, this is text")
    (tmp_path / "w.ckpt").write_text("")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"a": torch.zeros(3), "epoch": 3}, tmp_path / "extra.pt")
    torch.save({}, tmp_path / "nothing.pt")
    whole = tmp_path / "cut.pt"
    torch.save({"a": torch.zeros(300)}, whole)
    whole.write_bytes(whole.read_bytes()[:700])
    for name, message in (
        ("text.pt", "not a file of torch.save"),
        ("empty.pt", "damaged or not a file of torch.save"),
        ("cut.pt", "damaged or not a file of torch.save"),
        ("text.safetensors", "cannot be read as safetensors"),
        ("w.ckpt", r"end in '.ckpt'; use .safetensors"),
        ("tensor.pt", "hold a Tensor, not a state dict"),
        ("extra.pt", "1 values that are no tensors: epoch"),
        ("nothing.pt", "hold nothing"),
        ("missing.pt", r"there is no file /.*missing.pt"),
    ):
        with pytest.raises(InputError, match=message):
            load_weights(tmp_path / name)


def test_a_flipped_byte_is_found(tmp_path):
    """Torch writes a checksum of every tensor and does not look at it."""
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(300)}, path)
    assert set(load_weights(path)) == {"a"}
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(300).numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"w.pt are damaged: the checksum of w/data/0 differs; copy the file again"):
        load_weights(path)


def test_weights_without_checksums_are_read(tmp_path):
    kept = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(300)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(kept)
    assert float(load_weights(tmp_path / "w.pt")["a"].sum()) == 300.0


def test_weights_that_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match="cannot write the weights"):
        save_weights(nn.Linear(1, 1), tmp_path / "nowhere" / "w.safetensors")


def test_what_others_wrote_is_read(tmp_path):
    state = {name: value.clone() for name, value in nn.Linear(3, 2).state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    assert same(load_weights(str(tmp_path / "w.safetensors")), state)
