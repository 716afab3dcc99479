import mmap
import subprocess
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.samples import as_source


class Items(Dataset):
    def __init__(self, items):
        self.items = list(items)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number]


X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.arange(6, dtype=np.int64)


def zarr_array(values, chunks=None):
    array = zarr.create_array(
        zarr.storage.MemoryStore(), shape=values.shape, dtype=values.dtype, chunks=chunks or values.shape
    )
    array[...] = values
    return array


def everything(source):
    return source.fetch(0, len(source))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.from_numpy(X),
        lambda: X,
        lambda: zarr_array(X, (2, 4)),
        lambda: list(X),
        lambda: Items(torch.from_numpy(X)),
        lambda: TensorDataset(torch.from_numpy(X)),
        lambda: X.tolist(),
    ],
    ids=["tensor", "numpy", "zarr", "list of samples", "dataset", "tensor dataset", "nested lists"],
)
def test_inputs_alone(make):
    if isinstance(data := make(), list) and isinstance(data[0], list):
        data = (data,)
    source = as_source(data)
    assert len(source) == 6
    assert source.spec is None
    samples = source.fetch(2, 5)
    assert torch.equal(samples.args[0], torch.from_numpy(X[2:5]))
    assert samples.args[0].dtype == torch.float32
    assert samples.kwargs == {}
    assert samples.targets is None
    assert samples.size == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.from_numpy(X), torch.from_numpy(Y)),
        lambda: [X, Y],
        lambda: (zarr_array(X, (4, 4)), zarr_array(Y, (2,))),
        lambda: (X, Y.tolist()),
        lambda: Items(zip(X, Y, strict=True)),
        lambda: Items([row, int(label)] for row, label in zip(X, Y, strict=True)),
        lambda: Subset(Items(zip(X, Y, strict=True)), range(6)),
        lambda: TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
        lambda: list(zip(X, Y, strict=True)),
        lambda: ((X,), Y),
    ],
    ids=["tensors", "list", "zarr", "labels", "dataset", "ints", "subset", "tensor dataset", "pairs", "nested"],
)
def test_inputs_and_targets_have_one_digest_in_every_container(make):
    source = as_source(make())
    samples = source.fetch(1, 4)
    assert torch.equal(samples.args[0], torch.from_numpy(X[1:4]))
    assert torch.equal(samples.targets, torch.from_numpy(Y[1:4]))
    assert source.digest() == as_source((X, Y)).digest()


@settings(max_examples=20, deadline=None)
@given(
    x=hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int64, np.uint8]),
        st.tuples(st.integers(1, 9), st.integers(1, 3)),
        elements=st.integers(0, 200),
    ),
    chunk=st.integers(1, 4),
)
def test_digest_is_the_same_in_every_container(x, chunk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digest")
    y = np.arange(len(x))
    np.savez(folder / "plain.npz", x=x, y=y)
    np.savez_compressed(folder / "packed.npz", x=x, y=y)
    np.save(folder / "x.npy", np.asfortranarray(x))
    digests = {
        as_source((torch.from_numpy(x), torch.from_numpy(y))).digest(),
        as_source((zarr_array(x, (chunk, x.shape[1])), y)).digest(),
        as_source(Items(zip(x, y, strict=True))).digest(),
        as_source(str(folder / "plain.npz")).digest(),
        as_source(str(folder / "packed.npz")).digest(),
        as_source((np.load(folder / "x.npy", mmap_mode="r"), y)).digest(),
        as_source((x.astype(x.dtype.newbyteorder(">")), y)).digest(),
    }
    assert len(digests) == 1
    assert as_source(folder / "x.npy").digest() == as_source(x).digest()


def test_dicts_go_to_the_model_by_keyword_and_labels_become_targets():
    for label in ("labels", "label", "target", "targets"):
        for data in (
            {"ids": X, "mask": X > 3, label: Y},
            Items({"ids": a, "mask": a > 3, label: b} for a, b in zip(X, Y, strict=True)),
        ):
            samples = everything(as_source(data))
            assert samples.args == ()
            assert sorted(samples.kwargs) == ["ids", "mask"]
            assert samples.kwargs["mask"].dtype == torch.bool
            assert torch.equal(samples.targets, torch.from_numpy(Y))


def test_several_positional_inputs_and_keyword_inputs_with_targets():
    for data in (((X, X + 1), Y), Items(((a, a + 1), b) for a, b in zip(X, Y, strict=True))):
        samples = everything(as_source(data))
        assert torch.equal(samples.args[1], samples.args[0] + 1)
        assert torch.equal(samples.targets, torch.from_numpy(Y))
    for data in (({"ids": X}, Y), Items((UserDict(ids=a), b) for a, b in zip(X, Y, strict=True))):
        assert torch.equal(everything(as_source(data)).kwargs["ids"], torch.from_numpy(X))


def test_targets_may_be_none():
    assert everything(as_source((X, None))).targets is None
    assert everything(as_source(Items((row, None) for row in X))).targets is None


def test_numbers_become_tensors():
    samples = everything(as_source(Items([(1.5, 2), (2.5, 3)])))
    assert samples.args[0].dtype == torch.float32
    assert samples.targets.dtype == torch.int64
    assert everything(as_source(Items([np.float64(1), np.float64(2)]))).args[0].dtype == torch.float64
    assert everything(as_source(Items([True, False]))).args[0].dtype == torch.bool
    assert everything(as_source(([1, 2], [0.5, 1.5]))).targets.dtype == torch.float32


def test_float64_arrays_stay_float64():
    assert everything(as_source(X.astype(np.float64))).args[0].dtype == torch.float64


@pytest.mark.parametrize(("given_dtype", "kept"), [(">f4", torch.float32), ("<u2", torch.int32), (">u4", torch.int64)])
def test_awkward_dtypes_keep_their_values(given_dtype, kept):
    tensor = everything(as_source(X.astype(given_dtype))).args[0]
    assert tensor.dtype == kept
    assert torch.equal(tensor.to(torch.float32), torch.from_numpy(X))


@pytest.mark.parametrize("dtype", [np.uint64, np.longdouble, "U3", "datetime64[s]", [("a", "f4")]])
def test_impossible_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match=r"train inputs has dtype .*convert"):
        as_source(np.zeros(3, dtype))


def test_object_arrays_are_refused_with_the_usual_reason():
    with pytest.raises(InputError, match=r"dtype object.*different lengths"):
        as_source(np.array([[1], [1, 2]], dtype=object))


def test_read_only_and_reversed_arrays_are_copied_without_a_warning(tmp_path):
    frozen = X.copy()
    frozen.flags.writeable = False
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for array in (frozen, mapped, X[::-1][::-1], np.broadcast_to(X[:1], X.shape)):
        tensor = everything(as_source(array)).args[0]
        tensor += 0
        assert tensor.shape == (6, 4)
    writeable = np.load(tmp_path / "x.npy", mmap_mode="r+")
    everything(as_source(writeable)).args[0].fill_(-1)
    assert np.array_equal(writeable, X)


def test_changes_in_a_memory_map_are_kept(tmp_path):
    for mode in ("r+", "c"):
        np.save(tmp_path / "x.npy", X)
        mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
        mapped[2] = 77
        source = as_source(mapped)
        source.fetch(0, 1)
        assert source.fetch(2, 3).args[0].tolist() == [[77.0] * 4]


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="pages can be given back on Linux only")
def test_a_memory_map_does_not_stay_in_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4096, 4096), dtype=np.float32))
    code = (
        "import sys, numpy as np; from ooc_ntk.inputs.samples import as_source\n"
        "def peak():\n"
        "    return [int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')][0]\n"
        "before = peak()\n"
        "as_source(sys.argv[1]).digest()\n"
        "as_source(np.load(sys.argv[1], mmap_mode='r')).digest()\n"
        "assert peak() - before < 32 * 1024, peak() - before\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "x.npy")], check=True, timeout=60)


def test_tensors_lose_their_graph_but_not_their_memory():
    weight = torch.zeros(3, 2, requires_grad=True)
    tensor = as_source(weight).fetch(1, 3).args[0]
    assert not tensor.requires_grad
    assert tensor.data_ptr() == weight[1:].data_ptr()


@pytest.mark.parametrize("tensor", [torch.zeros(3, 2).to_sparse(), torch.zeros(3, device="meta")])
def test_tensors_without_plain_values_are_refused(tensor):
    with pytest.raises(InputError, match="only dense tensors"):
        as_source(tensor)


def test_uint64_tensors_are_refused():
    with pytest.raises(InputError, match=r"torch.uint64.*int64"):
        as_source(torch.zeros(3, dtype=torch.uint64))


def test_a_source_is_returned_as_it_is():
    source = as_source(X)
    assert as_source(source) is source


def test_zarr_is_read_lazily():
    class Spy:
        shape, dtype, chunks = (6, 4), np.dtype(np.float32), (2, 4)

        def __init__(self):
            self.reads = []

        def __getitem__(self, key):
            self.reads.append(key)
            return X[key]

    spy = Spy()
    source = as_source(spy)
    assert spy.reads == []
    assert source.chunk_rows == 2
    source.fetch(2, 4)
    assert spy.reads == [slice(2, 4)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((0, 3)), r"train data is empty: inputs has shape \(0, 3\)"),
        (torch.zeros(0, 3), "empty"),
        ([], "empty"),
        ((), "empty"),
        (Items([]), "Items has length 0"),
        ({}, "no model inputs"),
        ({"labels": Y}, "no model inputs"),
        ({1: X}, "keyword names"),
        ({"x": X, "label": Y, "targets": Y}, "'label' and 'targets'"),
        (np.float32(3), "cannot be read as data"),
        (np.array(3.0), "0-d"),
        ((X, np.array(1)), "train targets is a single number"),
        (torch.tensor(1.0), "0-d"),
        ((X, Y[:5]), "inputs has 6 samples, targets has 5"),
        ({"a": X, "b": X[:2]}, "input 'a' has 6 samples, input 'b' has 2"),
        (((X, X[:2]), Y), "input 0 has 6 samples, input 1 has 2"),
        ((X, X, Y), r"of 3 values.*\(\(input, input\), targets\)"),
        (TensorDataset(*[torch.zeros(2, 1)] * 3), "collate"),
        (Items([(1, 2, 3)]), "train sample 0 is a tuple of 3 values.*collate"),
        (Items([((), 2)]), "no model inputs"),
        (Items([({1: 2}, 2)]), "keyword names"),
        (Items(["text"]), r"of type str.*transform"),
        (Items([(X[0], "cat")]), "sample 0, target is of type str"),
        (Items([2**70]), "int64"),
        (object(), "of type object.*pass a map-style Dataset"),
        (7, "of type int"),
        (b"bytes", "of type bytes"),
        (None, "of type NoneType"),
        ((X, object()), "train targets is of type object, not an array"),
        (([[1, 2], [3]], Y), "differing lengths"),
        ((Items([1]), Y), "pass the Dataset alone"),
    ],
)
def test_bad_data_is_refused_with_a_reason(data, message):
    with pytest.raises(InputError, match=message):
        as_source(data)


def test_the_data_set_is_named():
    with pytest.raises(InputError, match="test data is empty"):
        as_source([], what="test")


def test_loaders_and_iterable_datasets_are_refused():
    with pytest.raises(InputError, match="pass the Dataset, not the DataLoader"):
        as_source(DataLoader(Items([1, 2])))

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1])

    with pytest.raises(InputError, match="IterableDataset"):
        as_source(Stream())

    class NoLength(Dataset):
        def __getitem__(self, number):
            return number

    with pytest.raises(InputError, match="NoLength has no length"):
        as_source(NoLength())


def test_images_ask_for_a_transform():
    image_type = type("Image", (), {"__module__": "PIL.Image"})
    with pytest.raises(InputError, match=r"sample 0, input 0 is an image \(PIL.Image.Image\).*ToTensor"):
        as_source(Items([(image_type(), 3)]))


@pytest.mark.parametrize("start", [0, 3])
def test_differing_shapes_name_the_sample_and_both_shapes(start):
    source = as_source(Items([torch.zeros(2, 3)] * 4 + [torch.zeros(2, 5)] + [torch.zeros(2, 3)]))
    with pytest.raises(InputError, match=r"sample 4: input 0 has shape \(2, 5\).*\(2, 3\).*collate"):
        source.fetch(start, 6)


def test_differing_dtypes_and_forms_are_refused():
    with pytest.raises(InputError, match=r"dtype torch\.float64"):
        everything(as_source(Items([torch.zeros(2), torch.zeros(2).double()])))
    with pytest.raises(InputError, match="train sample 1 has input 0, but sample 0 has input 0, targets"):
        everything(as_source(Items([(1.0, 2), 1.0])))


def test_an_error_of_the_data_set_names_the_sample_and_is_kept():
    class Broken(Items):
        def __getitem__(self, number):
            if number == 3:
                raise KeyError("file 3")
            return 1.0

    with pytest.raises(InputError, match=r"sample 3 cannot be read: Broken\[3\] raised KeyError") as caught:
        everything(as_source(Broken(range(5))))
    assert isinstance(caught.value.__cause__, KeyError)


def test_collate_makes_the_batch():
    rows = [torch.ones(length) for length in (3, 1, 2)]

    def pad(items):
        return {
            "x": torch.nn.utils.rnn.pad_sequence(items, batch_first=True),
            "labels": np.arange(len(items)),
        }

    samples = everything(as_source(Items(rows), collate=pad))
    assert samples.kwargs["x"].shape == (3, 3)
    assert samples.targets.tolist() == [0, 1, 2]
    three = Items([(1.0, 2.0, 3)] * 4)
    samples = everything(as_source(three, collate=lambda items: ((torch.ones(4), torch.ones(4)), torch.zeros(4))))
    assert len(samples.args) == 2
    assert as_source(TensorDataset(*[torch.zeros(2, 1)] * 3), collate=lambda items: torch.zeros(len(items), 1)).digest()


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (lambda items: torch.zeros(1, 4), r"has shape \(1, 4\) for 6 samples"),
        (lambda items: torch.tensor(1.0), "first dimension counts"),
        (lambda items: (1, 2, 3), "tuple of 3 values"),
        (lambda items: 1 / 0, "collate raised ZeroDivisionError on a list of 6 samples"),
    ],
)
def test_bad_collate_functions_are_named(collate, message):
    source = as_source(Items(X), collate=collate)
    with pytest.raises(InputError, match=message):
        everything(source)


def test_collate_needs_a_dataset():
    with pytest.raises(InputError, match="samples of a Dataset"):
        as_source(X, collate=len)
    with pytest.raises(InputError, match="samples of a Dataset"):
        as_source("digits", collate=len)
    with pytest.raises(InputError, match="must be a function"):
        as_source(Items(X), collate=3)


def test_a_long_dataset_is_digested_from_512_samples():
    class Counting(Items):
        reads = 0

        def __getitem__(self, number):
            self.reads += 1
            return self.items[number]

    data = Counting(range(600))
    source = as_source(data)
    before = data.reads
    digest = source.digest()
    assert data.reads - before == 512
    data.items[0] = 5
    assert source.digest() != digest
    data.items[0] = 0
    assert source.digest() == digest
    assert as_source(Counting(range(601))).digest() != digest
