"""Samples as people see them: pixels on their own scale, classes and texts without the inputs."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.execution.labels import class_labels
from ooc_ntk.execution.shown import image_of, shown_samples
from ooc_ntk.inputs.builtin import BUILTIN
from ooc_ntk.inputs.images.source import open_images
from ooc_ntk.inputs.joined import JoinedSource
from ooc_ntk.inputs.samples import SlicedSource, as_source
from ooc_ntk.inputs.specs import resolve_spec
from ooc_ntk.inputs.text.files import Columns
from ooc_ntk.inputs.text.sources import TextFile, TextSource
from ooc_ntk.inputs.text.tokens import TokenTable
from tests.inputs.images.real_files import write_cifar10, write_imagefolder


def raw_digits(name):
    """Bytes of a built-in set in the order of its source, read from the file itself."""
    data = BUILTIN[name]
    folder = importlib.util.find_spec(data.package).submodule_search_locations[0]
    with gzip.open(Path(folder) / data.file, "rt") as lines:
        table = np.loadtxt(lines, dtype=np.uint8, delimiter=",")
    table = table[np.random.Generator(np.random.PCG64(0)).permutation(data.samples)]
    return table[:, :-1].reshape(-1, data.side, data.side) / data.scale, table[:, -1]


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_the_normalisation_of_built_in_images_is_undone(name):
    pixels, classes = raw_digits(name)
    found = shown_samples(SlicedSource(resolve_spec(name), 100, 200), [7, 3, 7])
    assert sorted(found) == [3, 7]
    for number, sample in found.items():
        np.testing.assert_allclose(sample.pixels, pixels[100 + number], atol=1e-6)
        assert (sample.index, sample.label, sample.text) == (number, classes[100 + number], None)
        assert not sample.stretched


def test_images_in_their_files_come_back_as_their_bytes(tmp_path):
    write_cifar10(tmp_path)
    known = open_images("cifar10:train", data_dir=tmp_path)
    bare = open_images("cifar10:train,normalize=none", data_dir=tmp_path)
    for source in (known, bare, open_images("cifar10:train,normalize=imagenet", data_dir=tmp_path)):
        sample = shown_samples(source, [4])[4]
        assert sample.pixels.shape == (32, 32, 3)
        assert not sample.stretched
        np.testing.assert_allclose(sample.pixels.transpose(2, 0, 1), bare.fetch(4, 5).args[0][0], atol=1e-6)
    assert JoinedSource([known, known]).normalisation == known.normalisation
    assert JoinedSource([known, bare]).normalisation is None


def test_classes_are_read_without_decoding_an_image(tmp_path):
    write_imagefolder(tmp_path / "photos")
    source = open_images(f"imagefolder:{tmp_path}/photos", data_dir=None)
    whole = source.fetch(0, len(source)).targets
    joined = JoinedSource([source, SlicedSource(source, 2, 5)])  # looks at a sample of each part
    decoded = source.decoded
    np.testing.assert_array_equal(class_labels(source), whole)
    np.testing.assert_array_equal(class_labels(SlicedSource(source, 1, 4)), whole[1:4])
    np.testing.assert_array_equal(class_labels(joined)[-3:], whole[2:5])
    assert source.decoded == decoded


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (torch.arange(3), [0, 1, 2]),
        (torch.arange(3)[:, None], [0, 1, 2]),
        (torch.tensor([True, False, True]), [1, 0, 1]),
        (torch.rand(3), None),
        (torch.ones(3, 2, dtype=torch.int64), None),
        (torch.tensor([0, 1, -1]), None),
        (None, None),
    ],
)
def test_classes_are_one_whole_number_a_sample(targets, wanted):
    inputs = torch.zeros(3, 5)
    source = as_source(inputs if targets is None else (inputs, targets))
    found = class_labels(source)
    assert (found if found is None else found.tolist()) == wanted
    label = shown_samples(source, [1])[1].label
    if wanted is not None:
        assert label == wanted[1]
        assert type(label) is int
    elif targets is not None and targets.ndim == 1:
        assert label == pytest.approx(targets[1].item())
    else:
        assert label is None


def unit(*shape):
    return torch.linspace(0, 1, int(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        (unit(1, 6, 5), (6, 5)),
        (unit(3, 6, 5), (6, 5, 3)),
        (unit(6, 5, 3), (6, 5, 3)),
        (unit(6, 5, 1), (6, 5)),
        (unit(6, 5), (6, 5)),
        (unit(6, 5).double(), (6, 5)),
        (unit(64), None),
        (unit(2, 6, 5), None),
        (unit(3, 2, 5), None),
        (unit(1, 3, 6, 5), None),
        (unit(6, 5) > 0.5, None),
        (torch.complex(unit(6, 5), unit(6, 5)), None),
    ],
)
def test_what_is_an_image(values, shape):
    pixels, stretched = image_of(values)
    assert (None if pixels is None else pixels.shape) == shape
    assert not stretched
    if shape is not None:
        np.testing.assert_allclose(np.sort(pixels.ravel()), np.sort(values.ravel()), atol=1e-7)


def test_scales_of_pixels():
    counts = torch.arange(30, dtype=torch.uint8).reshape(6, 5)
    np.testing.assert_allclose(image_of(counts)[0], counts / 255.0, rtol=1e-6)
    values = 4 * unit(6, 5) - 2
    pixels, stretched = image_of(values)
    assert stretched
    np.testing.assert_allclose(pixels, unit(6, 5), atol=1e-6)
    pixels, stretched = image_of((unit(6, 5) - 0.3) / 0.2, ((0.3,), (0.2,)))
    assert not stretched
    np.testing.assert_allclose(pixels, unit(6, 5), atol=1e-6)
    assert image_of(values, ((0.3,), (0.2,)))[1], "what a normalisation does not bring to [0, 1] is stretched"
    constant, stretched = image_of(torch.full((6, 5), 7.0))
    assert stretched
    assert not constant.any()


def texts_of(path, columns, count):
    tokens = TokenTable(np.arange(count, dtype=np.int32), np.arange(count + 1), None, 0)
    return TextSource(tokens, torch.arange(count), file=TextFile(path, columns))


def test_texts_come_from_their_file_again(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "b.tsv").write_text("text\tother\n4\tfour\n5\tfive\n")
    first, pairs = texts_of(tmp_path / "a.txt", Columns(), 3), texts_of(tmp_path / "b.tsv", Columns(pair="other"), 2)
    assert first.texts([2, 0]) == ["three", "one"]
    assert pairs.texts([1]) == ["5 | five"]
    assert SlicedSource(first.padded(4), 1, 3).texts([0]) == ["two"]
    joined = JoinedSource([first, pairs])
    assert joined.texts([4, 0, 3]) == ["5 | five", "one", "4 | four"]
    found = shown_samples(joined, [4, 1])
    assert (found[4].text, found[4].label, found[4].pixels) == ("5 | five", 1, None)
    assert JoinedSource([first, texts_of(tmp_path / "a.txt", Columns(), 3)]).targets(2, 5).tolist() == [2, 0, 1]
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"a\.txt holds 1 texts by now and held 3; bring the file back"):
        first.texts([0])


def test_tokens_without_a_file_have_no_text_and_are_no_image():
    tokens = TokenTable(np.arange(64, dtype=np.int32), np.arange(0, 65, 8), None, 0)
    sample = shown_samples(TextSource(tokens, None), [0])[0]
    assert (sample.text, sample.pixels, sample.label) == (None, None, None)
