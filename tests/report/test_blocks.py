"""The picture of a kernel against the kernel itself."""

import numpy as np
import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk import api
from ooc_ntk.report import blocks
from ooc_ntk.report.blocks import kernel_map, make_axes

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")


def dense_means(kernel, rows, columns, numbers=None):
    """Block means by the definition."""
    whole = np.asarray(kernel[:, :], dtype=np.float64)
    whole = whole if numbers is None else whole[numbers]
    found = np.empty((len(rows.counts), len(columns.counts)))
    for row in range(len(rows.counts)):
        for column in range(len(columns.counts)):
            found[row, column] = whole[np.ix_(rows.pixels == row, columns.pixels == column)].mean()
    return found


def check_classes(found, kernel, labels):
    """Statistics by class by the definition."""
    square = np.asarray(kernel[:, :], dtype=np.float64)[: kernel.shape[1]]
    each = np.repeat(labels.train, kernel.entries_per_sample)
    other = ~np.eye(len(square), dtype=bool)
    same = each[:, None] == each
    for place, mask in ((found.within, same & other), (found.between, ~same)):
        np.testing.assert_allclose(place, (square[mask].mean(), square[mask].std()), rtol=1e-9)
    names = [int(name) for name in found.names]
    for a, first in enumerate(names):
        for b, second in enumerate(names):
            mask = (each[:, None] == first) & (each == second) & other
            if mask.any():
                np.testing.assert_allclose(found.means[a, b], square[mask].mean(), rtol=1e-9)
                np.testing.assert_allclose(found.spreads[a, b], square[mask].std(), rtol=1e-6, atol=1e-9)
            else:
                assert np.isnan(found.means[a, b])


@pytest.mark.parametrize("pixels", [500, 23])
def test_means_and_classes_of_a_kernel_in_tiles(exact, monkeypatch, pixels):
    monkeypatch.setattr(blocks, "MOST_PIXELS", pixels)
    kernel, labels = api.open(exact), api.run_labels(exact)
    found = kernel_map(kernel, labels)
    assert found.means.shape[0] <= pixels + 20, "every class has a pixel at least, of train and of test samples"
    np.testing.assert_allclose(found.means, dense_means(kernel, found.rows, found.columns), rtol=1e-9)
    check_classes(found.blocks, kernel, labels)
    assert found.looked_at == 80


def test_rows_are_ordered_by_class_and_test_rows_come_last(exact):
    kernel, labels = api.open(exact), api.run_labels(exact)
    rows, columns = make_axes(kernel, labels)
    for group in columns.groups:
        members = labels.train[(columns.pixels >= group.start) & (columns.pixels < group.stop)]
        assert set(members.tolist()) == {int(group.name)}
    assert [group.name for group in columns.groups] == [str(each) for each in np.unique(labels.train)]
    assert (rows.pixels[:60] < rows.train_pixels).all()
    assert (rows.pixels[60:] >= rows.train_pixels).all()
    test_groups = [group for group in rows.groups if group.start >= rows.train_pixels]
    assert [group.name for group in test_groups] == [str(each) for each in np.unique(labels.test)]


def test_without_labels_rows_stay_in_their_order(exact):
    kernel = api.open(exact)
    found = kernel_map(kernel, None)
    assert found.blocks is None
    assert not found.rows.groups
    assert found.rows.pixels.tolist() == list(range(80))
    np.testing.assert_allclose(found.means, kernel[:, :], rtol=1e-6)


def test_of_a_very_large_kernel_some_rows_are_looked_at(exact, monkeypatch):
    monkeypatch.setattr(blocks, "WHOLE_BYTES", 0)
    monkeypatch.setattr(blocks, "SAMPLED_ROWS", 13)
    kernel, labels = api.open(exact), api.run_labels(exact)
    found = kernel_map(kernel, labels)
    assert found.looked_at == 26
    numbers = blocks._some_rows(kernel)
    np.testing.assert_allclose(found.means, dense_means(kernel, found.rows, found.columns, numbers), rtol=1e-9)
    chosen = numbers[numbers < 60]
    part = np.asarray(kernel[:, :], dtype=np.float64)[chosen]
    same = (labels.train[chosen][:, None] == labels.train) & (chosen[:, None] != np.arange(60))
    np.testing.assert_allclose(found.blocks.within, (part[same].mean(), part[same].std()), rtol=1e-9)


def test_features_alone_and_full_kernels(make_run, digits_job):
    features = make_run("features", digits_job(projection="sjlt:64"), features_only=True)
    kernel, labels = api.open(features), api.run_labels(features)
    found = kernel_map(kernel, labels)
    np.testing.assert_allclose(found.means, dense_means(kernel, found.rows, found.columns), rtol=1e-5)
    full = make_run("full", digits_job("digits[0:12]", "digits[12:16]", kernel="full"))
    kernel, labels = api.open(full), api.run_labels(full)
    found = kernel_map(kernel, labels)
    assert found.means.shape == (160, 120)
    np.testing.assert_allclose(found.means, dense_means(kernel, found.rows, found.columns), rtol=1e-9)
    check_classes(found.blocks, kernel, labels)


def test_one_sample_and_one_class(make_run):
    images = torch.randn(6, 8)
    one = make_run("one", ooc_ntk.Job(nn.Linear(8, 3), images[:1]))
    found = kernel_map(api.open(one), None)
    assert found.means.shape == (1, 1)
    data = torch.utils.data.TensorDataset(images, torch.zeros(6, dtype=torch.long))
    job = ooc_ntk.Job(nn.Linear(8, 3), data)
    same = make_run("same", job)
    found = kernel_map(api.open(same), api.run_labels(same, job))
    assert found.blocks is None
    assert [group.name for group in found.columns.groups] == ["0"]
