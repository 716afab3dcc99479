import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.errors import InputError
from ooc_ntk.inputs import source as source_module
from ooc_ntk.inputs.samples import SlicedSource, as_source, digest_samples
from ooc_ntk.inputs.source import SampleHasher, Samples, spaced_samples


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count * 3, dtype=torch.float32).reshape(count, 3)


@given(count=st.integers(1, 300), wanted=st.integers(1, 300))
def test_spaced_samples_are_distinct_ascending_and_reach_both_ends(count, wanted):
    picked = spaced_samples(count, wanted)
    assert len(picked) == min(count, wanted)
    assert picked == sorted(set(picked))
    assert picked[0] == 0
    assert wanted == 1 or picked[-1] == count - 1


@given(count=st.integers(1, 40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_digest_does_not_depend_on_how_the_stream_is_cut(count, cuts):
    x, y = numbers(count), torch.arange(count)
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    hasher = SampleHasher()
    for start, stop in itertools.pairwise(edges):
        hasher.update(Samples((x[start:stop],), {}, y[start:stop]))
    assert hasher.hexdigest() == digest_samples(Samples((x,), {}, y)) == as_source((x, y)).digest()


@pytest.mark.parametrize(
    "other",
    [
        Samples((numbers(4) + 1,), {}, None),
        Samples((numbers(4).double(),), {}, None),
        Samples((numbers(4).reshape(4, 1, 3),), {}, None),
        Samples((numbers(4)[:3],), {}, None),
        Samples((), {"x": numbers(4)}, None),
        Samples((numbers(4),), {}, torch.zeros(4)),
    ],
    ids=["values", "dtype", "shape", "count", "name", "targets"],
)
def test_digest_sees_every_difference(other):
    assert digest_samples(other) != digest_samples(Samples((numbers(4),), {}, None))


def test_digest_takes_dtypes_that_numpy_lacks_and_any_memory_order():
    x = numbers(4)
    assert digest_samples(Samples((x.t().contiguous().t(),), {}, None)) == digest_samples(Samples((x,), {}, None))
    assert len(digest_samples(Samples((x.bfloat16(),), {}, None))) == 32


def test_large_arrays_are_digested_from_spaced_samples(monkeypatch):
    monkeypatch.setattr(source_module, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(source_module, "_ARRAY_SAMPLES", 5)
    x = numbers(41)
    sampled, unsampled = x.clone(), x.clone()
    sampled[10] += 1
    unsampled[11] += 1
    digest = as_source(x).digest()
    assert as_source(sampled).digest() != digest
    assert as_source(unsampled).digest() == digest
    assert as_source(x[:-1]).digest() != digest


def test_spaced_digest_reads_each_storage_chunk_once_and_equals_the_unchunked_one(monkeypatch):
    monkeypatch.setattr(source_module, "_WHOLE_BYTES", 100)
    monkeypatch.setattr(source_module, "_ARRAY_SAMPLES", 9)
    plain, chunked = as_source(numbers(41)), as_source(numbers(41))
    chunked.chunk_rows = 10
    reads = []
    read = chunked._read
    monkeypatch.setattr(chunked, "_read", lambda start, stop: reads.append((start, stop)) or read(start, stop))
    assert chunked.digest() == plain.digest()
    assert len(reads) == len({start // 10 for start, _ in reads}) == 5


@given(data=st.data(), count=st.integers(1, 30))
def test_slices_of_slices_are_slices(data, count):
    x = numbers(count)
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    inner = data.draw(st.integers(0, stop - start - 1))
    whole = as_source(x)
    whole.spec = "w"
    part = SlicedSource(SlicedSource(whole, start, stop), inner, stop - start)
    assert len(part) == stop - start - inner
    assert torch.equal(part.fetch(0, len(part)).args[0], x[start + inner : stop])
    assert part.spec == f"w[{start + inner}:{stop}]"
    assert part.digest() == as_source(x[start + inner : stop]).digest()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 11), (10, 10), (5, 5), (6, 4)])
def test_slices_outside_or_empty_are_refused(start, stop):
    with pytest.raises(InputError, match=r"has 10 samples|holds no sample"):
        SlicedSource(as_source(numbers(10)), start, stop)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 11), (3, 3)])
def test_fetch_refuses_ranges_outside(start, stop):
    with pytest.raises(InputError, match="data with 10 samples"):
        as_source(numbers(10)).fetch(start, stop)


def test_a_slice_of_a_live_source_has_no_spec():
    assert SlicedSource(as_source(numbers(4)), 1, 3).spec is None
