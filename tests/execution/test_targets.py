"""Targets that are given: arrays and files of train rows or all rows, and what is refused by name."""

from pathlib import Path

import numpy as np
import pytest

from ooc_ntk.errors import InputError, StorageError
from ooc_ntk.execution.targets import given_targets

SHAPE = (7, 5)


@pytest.mark.parametrize("shape", [(5,), (7,), (5, 2), (7, 1)])
@pytest.mark.parametrize("dtype", ["int64", "float32", "bool"])
def test_arrays_and_files_alike(shape, dtype, tmp_path):
    values = (np.arange(np.prod(shape)).reshape(shape) % 3).astype(dtype)
    np.save(tmp_path / "y.npy", values)
    for given in (values, values.tolist(), tmp_path / "y.npy", str(tmp_path / "y.npy")):
        found = given_targets(given, SHAPE)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(6), r"must have 5 rows, one per train row of the kernel, or 7 with those of the test rows; got shape"),
        (np.ones((5, 2, 2)), r"got shape \(5, 2, 2\)"),
        (np.ones(()), r"got shape \(\)"),
        (np.ones((5, 0)), r"at least one column, got shape \(5, 0\)"),
        (np.full(5, np.nan), "the targets hold NaN or infinity"),
        (np.ones(5, dtype=complex), "must be an array of numbers: they are complex"),
        (np.array(["a"] * 5), "must be an array of numbers: could not convert"),
    ],
    ids=str,
)
def test_arrays_that_are_refused(values, message, tmp_path):
    np.save(tmp_path / "y.npy", values)
    for given in (values, tmp_path / "y.npy"):
        with pytest.raises(InputError, match=message):
            given_targets(given, SHAPE)


def test_a_kernel_without_test_rows_takes_those_of_the_train_rows():
    with pytest.raises(InputError, match=r"must have 5 rows, one per train row of the kernel; got shape \(7,\)"):
        given_targets(np.ones(7), (5, 5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file of targets"),
        (b"", "is no NumPy file of numbers"),
        (b"1, 2, 3", "is no NumPy file of numbers"),
        (b"PK\x03\x04no zip file", "is no NumPy file of numbers"),
        (b"\x93NUMPY\x01\x00v\x00", "is no NumPy file of numbers"),
    ],
    ids=["none", "empty", "text", "zip", "cut off"],
)
def test_files_that_are_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "y.npy").write_bytes(content)
    with pytest.raises(InputError, match=message):
        given_targets(tmp_path / "y.npy", SHAPE)


def test_several_arrays_and_a_folder(tmp_path: Path):
    np.savez(tmp_path / "y.npz", one=np.ones(5), other=np.ones(5))
    with pytest.raises(InputError, match=r"y.npz is an archive of arrays \(one, other\); save the targets alone"):
        given_targets(tmp_path / "y.npz", SHAPE)
    with pytest.raises(StorageError, match="cannot read the targets"):
        given_targets(tmp_path, SHAPE)
