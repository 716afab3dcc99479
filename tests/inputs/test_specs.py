from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.samples import as_source
from ooc_ntk.inputs.specs import absolute_spec, parse_spec, resolve_spec

X = np.arange(40, dtype=np.float32).reshape(10, 4)
Y = np.arange(10)


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "f.npy", np.asfortranarray(X))
    np.savez(tmp_path / "xy.npz", x=X, y=Y)
    np.savez_compressed(tmp_path / "packed.npz", images=X, labels=Y)
    np.savez(tmp_path / "words.npz", ids=X, mask=X > 3, labels=Y)
    np.savez(tmp_path / "bare.npz", X)
    np.savez(tmp_path / "args.npz", X, Y)
    zarr.save_array(str(tmp_path / "x.zarr"), X)
    group = zarr.open_group(str(tmp_path / "xy.zarr"), mode="w")
    for name, values in (("inputs", X), ("targets", Y)):
        group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=(3, *values.shape[1:]))[...] = values
    (tmp_path / "my.py").write_text(
        "import numpy as np\nX = np.arange(40, dtype=np.float32).reshape(10, 4)\n"
        "def load():\n    return X, np.arange(10)\n"
        "def dataset():\n    return [(x, 1, 2) for x in X]\n"
        "def digits():\n    return 'digits[0:20]'\n"
        "def fails():\n    raise RuntimeError('no disk')\n"
        "def needs(size):\n    return size\n"
    )
    return tmp_path


@pytest.mark.parametrize("name", ["x.npy", "f.npy", "bare.npz", "x.zarr", "my.py:X", "x.zarr/"])
def test_inputs_alone(folder, name):
    source = resolve_spec(name, base=folder)
    samples = source.fetch(3, 7)
    assert torch.equal(samples.args[0], torch.from_numpy(X[3:7]))
    assert samples.targets is None
    assert source.spec == str(folder / name).rstrip("/")
    assert source.digest() == as_source(X).digest()


@pytest.mark.parametrize("name", ["xy.npz", "packed.npz", "args.npz", "xy.zarr", "my.py:load"])
def test_inputs_and_targets(folder, name):
    source = resolve_spec(name, base=folder)
    samples = source.fetch(3, 7)
    assert torch.equal(samples.args[0], torch.from_numpy(X[3:7]))
    assert torch.equal(samples.targets, torch.from_numpy(Y[3:7]))
    assert source.digest() == as_source((X, Y)).digest()
    assert resolve_spec(source.spec).digest() == source.digest()


def test_other_members_go_by_keyword(folder):
    samples = resolve_spec("words.npz", base=folder).fetch(0, 10)
    assert sorted(samples.kwargs) == ["ids", "mask"]
    assert torch.equal(samples.targets, torch.from_numpy(Y))


def test_rows_are_fresh_memory_and_not_the_file(folder):
    for name in ("x.npy", "f.npy", "xy.npz", "x.zarr"):
        resolve_spec(name, base=folder).fetch(0, 10).args[0].fill_(-1)
        assert torch.equal(resolve_spec(name, base=folder).fetch(0, 10).args[0], torch.from_numpy(X))


def test_relative_paths_start_at_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert resolve_spec("x.npy[2:4]").spec == f"{folder}/x.npy[2:4]"
    assert absolute_spec("my.py:load[:3]") == f"{folder}/my.py:load[:3]"
    assert absolute_spec("a.b:load[1:]") == "a.b:load[1:]"
    assert absolute_spec(" digits ") == "digits"


@given(data=st.data())
def test_slices_are_those_of_python(data):
    start = data.draw(st.none() | st.integers(0, 1796))
    stop = data.draw(st.none() | st.integers((start or 0) + 1, 1797))
    text = (
        "digits"
        if start is stop is None
        else f"digits[{'' if start is None else start}:{'' if stop is None else stop}]"
    )
    whole = resolve_spec("digits")
    part = resolve_spec(text)
    assert len(part) == len(range(1797)[start:stop])
    first = part.fetch(0, 1)
    assert torch.equal(first.args[0], whole.fetch(start or 0, (start or 0) + 1).args[0])
    assert resolve_spec(part.spec).spec == part.spec
    assert str(parse_spec(text)) == text


@given(
    target=st.sampled_from(
        ["digits", "mnist5k", "/a b/x.npy", "rel/y.npz", "z.zarr", "my.py:load", "a.b:c", "x[1].npy"]
    ),
    start=st.none() | st.integers(0, 10**9),
    stop=st.none() | st.integers(0, 10**9),
)
def test_specs_round_trip(target, start, stop):
    bounds = "" if start is stop is None else f"[{'' if start is None else start}:{'' if stop is None else stop}]"
    spec = parse_spec(target + bounds)
    assert (spec.target, spec.start, spec.stop) == (target, start, stop)
    assert parse_spec(str(spec)) == spec
    absolute = absolute_spec(target + bounds, Path("/base"))
    assert absolute_spec(absolute, Path("/elsewhere")) == absolute


def test_a_factory_may_name_other_data_or_need_collate(folder):
    assert len(resolve_spec("my.py:digits[5:]", base=folder)) == 15
    source = resolve_spec("my.py:dataset", base=folder, collate=lambda items: np.stack([item[0] for item in items]))
    assert torch.equal(source.fetch(0, 10).args[0], torch.from_numpy(X))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no data"),
        ("[0:3]", "names no data"),
        ("x.npy[-3:]", r"counts from the end"),
        ("x.npy[:-1]", r"counts from the end"),
        ("x.npy[0:11]", r"'x.npy\[0:11\]': slice \[0:11\] is outside the data, which has 10 samples"),
        ("x.npy[10:]", "has 10 samples"),
        ("x.npy[4:4]", "holds no sample"),
        ("x.npy[5:4]", "holds no sample"),
        ("x.npy[:]", r"write \[start:stop\]"),
        ("x.npy[3]", r"write \[start:stop\]"),
        ("x.npy[a:b]", r"write \[start:stop\]"),
        ("x.npy[0:4:2]", r"write \[start:stop\]"),
        ("mnist5", "unknown data set 'mnist5'; did you mean 'mnist5k'"),
        ("mnist5k:train", "has no parts"),
        ("my.py", "my.py:function"),
        ("table.csv", "cannot be read"),
        ("some/folder", "cannot be read"),
        ("missing.npy", r"there is no file /.*missing.npy"),
        ("missing.zarr", r"there is no file /.*missing.zarr"),
        ("missing.py:load", r"there is no file /.*missing.py"),
        ("my.py:lod", "unknown name in my.py for train data 'lod'; did you mean 'load'"),
        ("my.py:fails", "RuntimeError: no disk"),
        ("my.py:needs", "without arguments"),
        ("no_such_module_x:load", "there is no module 'no_such_module_x'"),
    ],
)
def test_bad_specs_are_refused_with_a_reason(folder, text, message):
    with pytest.raises(InputError, match=message):
        resolve_spec(text, base=folder)


def test_pickled_and_damaged_files_are_refused(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", x=np.array([{}], dtype=object))
    np.savez_compressed(tmp_path / "p.npz", x=np.array([{}], dtype=object))
    for name in ("o.npy", "o.npz", "p.npz"):
        with pytest.raises(InputError, match="pickled Python objects"):
            resolve_spec(name, base=tmp_path)
    (tmp_path / "pickle.npy").write_bytes(b"\x80\x04K\x01.\x00\x00\x00")
    with pytest.raises(InputError, match="could run code"):
        resolve_spec("pickle.npy", base=tmp_path)
    (tmp_path / "text.npy").write_text("hello, world")
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\x05\x00hello")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "dir.npy").mkdir()
    (tmp_path / "empty.zarr").mkdir()
    for name, message in (
        ("text.npy", "not in NumPy's .npy format"),
        ("header.npy", "damaged .npy header"),
        ("text.npz", "cannot be read as .npz"),
        ("dir.npy", "not a file"),
        ("empty.zarr", "neither a zarr array nor a zarr group"),
    ):
        with pytest.raises(InputError, match=message):
            resolve_spec(name, base=tmp_path)


def test_truncated_files_are_refused_also_when_they_shrink_later(tmp_path):
    np.save(tmp_path / "x.npy", X)
    source = resolve_spec("x.npy", base=tmp_path)
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(whole[:-40])
    with pytest.raises(InputError, match="cut short"):
        resolve_spec("x.npy", base=tmp_path)
    with pytest.raises(InputError, match="has the file changed"):
        source.fetch(0, 10)


def test_empty_archives_and_groups_are_refused(tmp_path):
    np.savez(tmp_path / "e.npz")
    zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    for name in ("e.npz", "g.zarr"):
        with pytest.raises(InputError, match="holds no arrays"):
            resolve_spec(name, base=tmp_path)


def test_a_large_file_is_read_by_rows_only(tmp_path):
    path = tmp_path / "sparse.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(10**6, 1000)).flush()
    source = resolve_spec(str(path))
    assert source.fetch(999_990, 10**6).args[0].shape == (10, 1000)
