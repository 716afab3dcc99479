"""Labels of a run: from its data, in pieces, without the inputs where they are kept apart."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import ooc_ntk
from ooc_ntk.api import run_labels
from ooc_ntk.errors import InputError, RunConflictError, StorageError
from ooc_ntk.execution import labels as labels_module
from ooc_ntk.inputs.arrays import ArraySource
from ooc_ntk.inputs.images.source import ImageSource
from tests.cases import case, digits

pytestmark = pytest.mark.usefixtures("one_thread")


READ = {kind: kind._read for kind in (ArraySource, ImageSource)}


def refuse(source, start, stop):
    """The first sample says how parts that are joined are laid out; no other is read."""
    if stop - start > 1:
        raise AssertionError("inputs were read for the sake of labels")
    return READ[type(source)](source, start, stop)


def test_of_data_by_name(compute, monkeypatch):
    kernel = compute(ooc_ntk.Job("mlp,width=4", "digits[0:30]", "digits[30:37]", device="cpu"))
    monkeypatch.setattr(labels_module, "PIECE", 8)
    monkeypatch.setattr(ArraySource, "_read", refuse)
    found = run_labels(kernel.path)
    labels = ooc_ntk.Job("mlp", "digits").train_source().targets(0, 37).numpy()
    assert found.train.dtype == np.int64
    np.testing.assert_array_equal(found.train, labels[:30])
    np.testing.assert_array_equal(found.test, labels[30:])
    assert found.classes == 1 + labels.max()


def test_of_images_without_decoding_them(compute, monkeypatch):
    kernel = compute(
        ooc_ntk.Job("lenet", "fakedata,size=32,samples=12 + fakedata,size=32,samples=20[4:9]", device="cpu")
    )
    source = ooc_ntk.Job("lenet", "fakedata,size=32,samples=12").train_source()
    wanted = source.fetch(0, 12).targets
    monkeypatch.setattr(ImageSource, "_read", refuse)
    found = run_labels(kernel.path)
    assert len(found.train) == 17
    np.testing.assert_array_equal(found.train[:12], wanted)
    assert len(found.test) == 0


def test_of_a_live_model_on_data_by_name(compute):
    kernel = compute(ooc_ntk.Job(case("smooth-mlp").module, "digits[5:9]", device="cpu"))
    assert len(run_labels(kernel.path).train) == 4


def test_of_live_data_with_their_job(compute):
    chosen = case("smooth-mlp")
    job = chosen.job()
    kernel = compute(job)
    with pytest.raises(InputError, match="was made from live Python data, so that its labels are not known here"):
        run_labels(kernel.path)
    found = run_labels(kernel.path, job)
    np.testing.assert_array_equal(found.train, chosen.labels)
    np.testing.assert_array_equal(found.test, chosen.test_labels)
    with pytest.raises(RunConflictError, match="is of 26 train samples, its data have 3 now; give its job as it was"):
        run_labels(kernel.path, ooc_ntk.Job(chosen.module, (chosen.train[:3], chosen.labels[:3])))


@pytest.mark.parametrize(
    "targets",
    [None, torch.rand(6), torch.zeros(6, 2, dtype=torch.long), torch.tensor([0, 1, -1, 0, 1, 2])],
    ids=["none", "numbers", "several", "negative"],
)
def test_what_are_no_labels(targets, compute):
    images = digits()[0][:6]
    job = ooc_ntk.Job(case("smooth-mlp").module, images if targets is None else (images, targets), device="cpu")
    assert run_labels(compute(job).path, job) is None


@pytest.mark.parametrize("targets", [torch.tensor([True, False] * 3), torch.tensor([1, 0] * 3)[:, None]])
def test_two_classes_as_truth_values_or_as_a_column(targets, compute):
    job = ooc_ntk.Job(case("smooth-mlp").module, (digits()[0][:6], targets), device="cpu")
    assert run_labels(compute(job).path, job).train.tolist() == [1, 0] * 3


def test_of_a_dataset(compute):
    images, labels = (each[:6] for each in digits())
    job = ooc_ntk.Job(case("smooth-mlp").module, TensorDataset(images, labels), device="cpu")
    np.testing.assert_array_equal(run_labels(compute(job).path, job).train, labels)


def test_where_there_is_no_run(tmp_path):
    with pytest.raises(StorageError):
        run_labels(tmp_path)
