"""Results in a run directory: JSON that any reader takes, arrays, nothing half-written."""

import json

import numpy as np
import pytest

from ooc_ntk.errors import StorageError
from ooc_ntk.storage.results import read_result, write_result


def test_what_is_written_is_read(tmp_path):
    figures = {
        "a": np.float32(1.5),
        "b": np.arange(3),
        "c": [np.int64(2), (1, None)],
        "d": {"e": np.bool_(True)},
        5: "x",
    }
    folder = write_result(tmp_path, "fit", figures, {"values": np.eye(2)})
    wanted = {"a": 1.5, "b": [0, 1, 2], "c": [2, [1, None]], "d": {"e": True}, "5": "x"}
    assert read_result(tmp_path, "fit") == wanted
    assert np.array_equal(np.load(folder / "fit.npz")["values"], np.eye(2))
    write_result(tmp_path, "fit", {"a": 2})
    assert read_result(tmp_path, "fit") == {"a": 2}


def test_what_json_has_not_becomes_null(tmp_path):
    write_result(tmp_path, "fit", {"nan": np.nan, "inf": [np.float64("inf"), 1.0]})
    text = (tmp_path / "fit" / "fit.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"nan": None, "inf": [None, 1.0]}


def test_what_is_not_there_or_torn_is_none(tmp_path):
    assert read_result(tmp_path, "fit") is None
    write_result(tmp_path, "fit", {})
    (tmp_path / "fit" / "fit.json").write_text("{")
    assert read_result(tmp_path, "fit") is None


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "fit").write_text("a file")
    with pytest.raises(StorageError, match="fit"):
        write_result(tmp_path, "fit", {})
