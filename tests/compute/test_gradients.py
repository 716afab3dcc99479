"""Pieces of gradients and their places, against whole gradients: every layer and way to use one."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from ooc_ntk.compute import gradients
from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.check import checked_structure
from ooc_ntk.compute.discover import find_structure
from ooc_ntk.compute.gradients import contiguous_pieces, gradient_pieces
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.model import choose_parameters
from ooc_ntk.compute.outputs import OutputRows
from ooc_ntk.compute.projection.backends import load_backend
from ooc_ntk.compute.projection.sketch import Sketch
from ooc_ntk.planning.memory import HOST_CHUNKS
from ooc_ntk.planning.projection import Projection
from tests import oracle
from tests.zoo import NAMES, TRAPS, zoo_case

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

#: Networks of which rules cover something; a layer that is called sample by sample is none.
COVERED = [name for name in (*NAMES, *TRAPS) if name != "sample by sample"]

#: Samples of the two batches: the same structure, other data.
FIRST, SECOND = slice(0, 9), slice(9, 16)


def batch_of(inputs, part):
    """Some samples as the model takes them, float64."""
    if isinstance(inputs, dict):
        chosen = ModelBatch((), {name: value[part] for name, value in inputs.items()}, None)
    else:
        each = inputs if isinstance(inputs, tuple) else (inputs,)
        chosen = ModelBatch(tuple(value[part] for value in each), {}, None)
    return chosen.to("cpu", "float64")


def capture_of(module, batch):
    """What derives everything that rules cover, as a run has it: found and compared with autograd."""
    names = choose_parameters(module, None)
    function = ModelFunction(module.double().eval(), names, OutputRows.of("logits", "trace"), "float64", "cpu")
    with torch.no_grad():
        rows = function.logits({}, batch).shape[1]
    structure = checked_structure(function, find_structure(function, batch, None), batch, rows)
    return Capture(function, structure, list(structure.layers), rows)


@functools.cache
def zoo_capture(name):
    chosen = zoo_case(name)
    return capture_of(copy.deepcopy(chosen.module), batch_of(chosen.inputs, FIRST))


def small_pieces(monkeypatch, items):
    """Cut gradients as if caches were that small."""
    monkeypatch.setattr(gradients, "rule_samples", lambda sample_bytes: 2)
    return dataclasses.replace(HOST_CHUNKS, items=items, unfolded_bytes=1)


def check(capture, batch, whole_rows=False, places=None, chunks=HOST_CHUNKS):
    """Add up the pieces of every parameter and compare them with its dense gradients.

    Args:
        capture: derives the batch.
        batch: the samples.
        whole_rows: whether pieces must hold all rows.
        places: of pieces that had a key, by parameter and key, in this batch and earlier ones.
        chunks: what is worked on at a time.

    Returns:
        How many pieces there were, by parameter.
    """
    places = {} if places is None else places
    captured, counts = capture.run(batch), {}
    for name in (name for layer in capture.layers for name in layer.parameters):
        dense = capture.dense(captured, name, slice(None))
        found, counts[name] = torch.zeros_like(dense), 0
        for piece in gradient_pieces(capture, captured, name, whole_rows=whole_rows, chunks=chunks):
            counts[name] += 1
            columns = piece.columns
            here = found[piece.samples, piece.rows]
            assert piece.values.shape == (*here.shape[:2], len(columns))
            assert piece.values.stride(2) == 1, "columns are next to each other"
            assert columns.dtype == torch.int64
            assert len(columns) == len(piece.outer) * len(piece.inner)
            if whole_rows:
                assert piece.rows == slice(0, capture.rows)
            if piece.start is not None:
                assert torch.equal(columns, torch.arange(piece.start, piece.start + len(columns)))
            if piece.key is not None:
                assert len(columns.unique()) == len(columns)
                assert torch.equal(places.setdefault((name, piece.key), columns), columns), f"{name} {piece.key}"
            here.index_add_(2, columns, piece.values)
        torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-10 * max(1.0, float(dense.abs().max())))
    return counts


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("items", [None, 40, 7], ids=["default", "small", "tiny"])
@pytest.mark.parametrize("name", COVERED)
def test_pieces_add_up_to_the_gradients(name, items, whole_rows, monkeypatch):
    """Of two batches of different size, whose pieces of one key have the same places."""
    capture, chosen = zoo_capture(name), zoo_case(name)
    chunks = HOST_CHUNKS if items is None else small_pieces(monkeypatch, items)
    assert capture.layers, "rules cover something"
    places = {}
    for part in (FIRST, SECOND):
        counts = check(capture, batch_of(chosen.inputs, part), whole_rows, places, chunks)
    largest = max(counts, key=capture.function.sizes.__getitem__)
    assert items is None or capture.function.sizes[largest] < 4 * items or counts[largest] > 2, "it is cut"


@pytest.mark.parametrize("name", COVERED)
def test_whole_gradients_are_autograds(name):
    """What pieces are compared with is compared with the oracle here."""
    capture, chosen = zoo_capture(name), zoo_case(name)
    names = [name for layer in capture.layers for name in layer.parameters]
    order = [key for key, _ in chosen.module.named_parameters() if key in names]
    captured = capture.run(batch_of(chosen.inputs, FIRST))
    rows = torch.cat([capture.dense(captured, key, slice(None)) for key in order], 2)
    module = chosen.reference or chosen.module
    prefix = "module." if chosen.reference is not None else ""
    inputs = chosen.inputs
    if isinstance(inputs, dict):
        inputs = {key: value[FIRST] for key, value in inputs.items()}
    else:
        inputs = tuple(value[FIRST] for value in (inputs if isinstance(inputs, tuple) else (inputs,)))
    wanted = oracle.jacobian(module, inputs, names=[prefix + key for key in order])
    torch.testing.assert_close(rows, torch.from_numpy(wanted), rtol=1e-8, atol=1e-8)


def test_a_linear_layer_whole_is_one_run_of_places():
    """What a shifted projection relies on."""
    capture = capture_of(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), plain_batch(5))
    captured = capture.run(plain_batch(5))
    found = list(gradient_pieces(capture, captured, "0.weight"))
    assert [(piece.start, piece.rows, piece.values.shape[2]) for piece in found] == [(0, slice(0, 3), 20)]


def test_places_that_do_not_follow_each_other_have_no_start(monkeypatch):
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    batch = ModelBatch((torch.randn(6, 2, 4, 4, dtype=torch.float64),), {}, None)
    capture = capture_of(module, batch)
    captured = capture.run(batch)
    assert all(piece.start is None for piece in gradient_pieces(capture, captured, "0.weight"))
    chunks = small_pieces(monkeypatch, 7)
    cut = list(gradient_pieces(capture, captured, "3.weight", whole_rows=True, chunks=chunks))
    assert all(len(piece.inner) < 12 for piece in cut), "every row of the weight is cut"
    assert all(piece.start is None for piece in cut)


@pytest.mark.parametrize("items", [10, 7, 100])
def test_contiguous_pieces(items):
    values = torch.randn(4, 3, 25)
    found = list(contiguous_pieces(values, slice(2, 6), dataclasses.replace(HOST_CHUNKS, items=items)))
    assert len(found) == -(-25 // items)
    assert torch.equal(torch.cat([piece.values for piece in found], 2), values)
    assert torch.equal(torch.cat([piece.columns for piece in found]), torch.arange(25))
    assert all((piece.samples, piece.rows) == (slice(2, 6), slice(0, 3)) for piece in found)
    assert len({piece.key for piece in found}) == len(found)


# --- one weight, used in ways that put its gradients in different orders ---------------------------------------------


def plain_batch(width, samples=6):
    generator = torch.Generator().manual_seed(1)
    return ModelBatch((torch.randn(samples, width, dtype=torch.float64, generator=generator),), {}, None)


class BothWays(nn.Module):
    """A square weight that is used as it is and the other way round, as in a layer and its tied inverse."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(torch.addmm(self.bias, torch.tanh(F.linear(x, self.weight)), self.weight)))


class TiedConvolutions(nn.Module):
    """A 1 × 1 convolution with as many channels on both sides, and the transposed one of the same weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.tanh(F.conv2d(x.view(-1, 4, 2, 2), self.weight))
        return self.head(torch.tanh(F.conv_transpose2d(x, self.weight)).flatten(1))


WAYS = {"linear": (BothWays, 5), "convolution": (TiedConvolutions, 16)}


@pytest.mark.parametrize("name", WAYS)
def test_pieces_of_one_key_have_the_same_places_in_every_use(name):
    make, width = WAYS[name]
    capture = capture_of(make(), plain_batch(width))
    assert any(len(layer.uses) == 2 for layer in capture.layers)
    check(capture, plain_batch(width))


@pytest.mark.parametrize("name", WAYS)
def test_sketches_of_a_weight_that_is_used_both_ways(name):
    """And the gradients of its heaviest parameters, which remember places as well."""
    make, width = WAYS[name]
    capture = capture_of(make(), plain_batch(width))
    captured, rows = capture.run(plain_batch(width)), capture.rows
    dense = capture.dense(captured, "weight", slice(None))
    sketch = Sketch(Projection("sjlt", 16), {"weight": 0}, load_backend("torch"), heavy=[1, 2, 7])
    sketch.begin(len(dense), rows)
    sketch.add("weight", contiguous_pieces(dense, slice(0, len(dense))))
    wanted = torch.cat([sketch.heavy, sketch.result()], 2)
    sketch.begin(len(dense), rows)
    sketch.add("weight", gradient_pieces(capture, captured, "weight"))
    torch.testing.assert_close(torch.cat([sketch.heavy, sketch.result()], 2), wanted, rtol=1e-10, atol=1e-10)
