"""Data of several parts: read across borders like one, refused where the parts do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import ooc_ntk
from ooc_ntk.errors import InputError
from ooc_ntk.inputs.job import LIVE, Job
from ooc_ntk.inputs.jobfile import read_job_file, write_job_file
from ooc_ntk.inputs.joined import JoinedSource, split_joined
from ooc_ntk.inputs.samples import as_source
from ooc_ntk.inputs.source import SlicedSource, digest_samples
from ooc_ntk.inputs.specs import absolute_spec, resolve_spec, train_and_test
from ooc_ntk.inputs.text.sources import TextSource
from ooc_ntk.inputs.text.tokens import TokenTable


@pytest.fixture
def folder(tmp_path):
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", x[:7])
    np.save(tmp_path / "b.npy", x)
    np.savez(tmp_path / "c.npz", x=x, y=np.arange(12))
    (tmp_path / "my.py").write_text("import numpy as np\n\n\ndef load():\n    return np.ones((4, 3), np.float32)\n")
    return tmp_path


class Squares(Dataset):
    """Samples that are read one by one; it counts the readings."""

    def __init__(self, start: int, stop: int) -> None:
        self.numbers, self.read = range(start, stop), 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int):
        self.read += 1
        return torch.full((3,), float(self.numbers[number])), self.numbers[number]


def test_every_range_is_that_of_one_array():
    values, classes = torch.randn(20, 3), torch.arange(20)
    parts = [as_source((values[a:b], classes[a:b])) for a, b in ((0, 5), (5, 6), (6, 20))]
    joined, whole = JoinedSource(parts), as_source((values, classes))
    ranges = [(start, stop) for start in range(20) for stop in range(start + 1, 21)]
    for start, stop in ranges:
        assert digest_samples(joined.fetch(start, stop)) == digest_samples(whole.fetch(start, stop))
    for found, (start, stop) in zip(joined.stream(ranges), ranges, strict=True):
        assert torch.equal(found.args[0], values[start:stop])
        assert torch.equal(found.targets, classes[start:stop])
    assert len(joined) == 20
    assert joined.digest() == whole.digest()
    assert SlicedSource(joined, 4, 8).digest() == SlicedSource(whole, 4, 8).digest()
    assert joined.sample_bytes == whole.sample_bytes


def test_a_range_outside_is_refused_when_it_is_asked_for():
    joined = JoinedSource([as_source(torch.zeros(3, 2)), as_source(torch.ones(2, 2))])
    with pytest.raises(InputError, match="samples 4 to 6 of data with 5 samples"):
        joined.fetch(4, 6)
    with pytest.raises(InputError, match="samples 4 to 6 of data with 5 samples"):
        joined.stream([(0, 1), (4, 6)])


def test_specs_join_in_text(folder, monkeypatch):
    text = "a.npy + b.npy[7:12] + my.py:load"
    source = resolve_spec(text, base=folder)
    assert split_joined(source.spec) == [f"{folder}/a.npy", f"{folder}/b.npy[7:12]", f"{folder}/my.py:load"]
    assert absolute_spec(text, folder) == f"{folder}/a.npy + {folder}/b.npy[7:12] + {folder}/my.py:load"
    whole = np.concatenate([np.load(folder / "b.npy"), np.ones((4, 3), np.float32)])
    assert np.array_equal(source.fetch(0, 16).args[0].numpy(), whole)
    assert resolve_spec(source.spec).digest() == source.digest()
    assert train_and_test("digits[0:3] + digits[9:12]") == ("digits[0:3] + digits[9:12]", None)
    monkeypatch.chdir(folder)
    job = Job("mlp,width=8", text)
    write_job_file(folder / "job.toml", {"model": "mlp,width=8", "train": text})
    assert read_job_file(folder / "job.toml").train == job.spec()["train"]
    assert Job.from_spec(job.spec()).train_source().digest() == source.digest()


def test_an_import_path_among_parts_needs_its_base(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert Job("mlp", "digits[0:3] + pkg.mod:load[0:2]").spec()["base"] == str(folder)
    assert "base" not in Job("mlp", "digits[0:3] + digits[0:2]").spec()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a.npy + digits[0:3]", r"'.*a.npy' and 'digits\[0:3\]' do not join"),
        ("a.npy + c.npz", r"'.*c.npz' has targets and '.*a.npy' has none"),
        ("a.npy + ", "names no data"),
        (" + a.npy", "names no data"),
        ("a.npy + nowhere.npy", "nowhere.npy"),
        ("a.npy + digit", "did you mean 'digits'"),
    ],
)
def test_parts_that_do_not_fit_are_named(folder, text, problem):
    with pytest.raises(InputError, match=problem):
        resolve_spec(text, base=folder)


def test_layouts_that_differ_are_named():
    first = as_source(torch.zeros(3, 2))
    for other, problem in (
        (torch.zeros(3, 3), r"input 0 of a sample has shape \(2,\) in the first, \(3,\) here"),
        (torch.zeros(3, 2, dtype=torch.float64), "dtype torch.float32 in the first, torch.float64 here"),
        ({"x": torch.zeros(3, 2)}, "the first has input 0, the other input 'x'"),
        ((torch.zeros(3, 2), torch.zeros(3)), "'part 2, 3 samples' has targets and 'part 1, 3 samples' has none"),
    ):
        with pytest.raises(InputError, match=problem):
            JoinedSource([first, as_source(other)])


def test_a_job_is_extended_by_text_and_by_live_data():
    job = Job("mlp,width=8", "digits[0:5]", test="digits[9:11]")
    assert job.extend("digits[5:8]").spec()["train"] == "digits[0:5] + digits[5:8]"
    twice = job.extend("digits[5:6]").extend("digits[6:8]")
    assert len(twice.train_source().parts) == 3
    assert twice.data_digests() == Job("mlp,width=8", "digits[0:8]", test="digits[9:11]").data_digests()
    data = resolve_spec("digits[5:8]").fetch(0, 3)
    live = job.extend((data.args[0], data.targets))
    assert live.spec()["train"] == LIVE
    assert live.data_digests() == twice.data_digests()
    assert job.train == "digits[0:5]"
    assert job.test_source().digest() == live.test_source().digest()


def test_open_data_and_model_stay_open():
    job = Job("mlp,width=8", "digits[0:5]")
    source, module = job.train_source(), job.module()
    grown = job.extend("digits[5:8]")
    assert grown.train_source().parts[0] is source
    assert grown.module() is module


def test_datasets_join_through_the_jobs_collate():
    first, second = Squares(0, 4), Squares(4, 9)

    def collate(items):
        return torch.stack([x for x, _ in items]) + 1, torch.tensor([y for _, y in items])

    job = Job(torch.nn.Linear(3, 2), first, collate=collate).extend(second)
    found = job.train_source().fetch(2, 7)
    assert found.targets.tolist() == [2, 3, 4, 5, 6]
    assert found.args[0][:, 0].tolist() == [3, 4, 5, 6, 7]
    assert job.spec()["train"] == LIVE


@pytest.mark.parametrize("more", [None, "CIFAR-10_0_2500_0_1000", "digits[0:0]", "digit"])
def test_nothing_and_test_data_cannot_be_appended(more):
    job = Job("mlp,width=8", "digits[0:5]")
    with pytest.raises(InputError):
        job.extend(more).train_source()


def test_images_by_name_join_without_decoding_twice(tmp_path):
    job = Job("lenet", "fakedata,size=16,samples=9[0:4] + fakedata,size=16,samples=9[4:9]")
    joined, whole = job.train_source(), Job("lenet", "fakedata,size=16,samples=9").train_source()
    for found, (start, stop) in zip(joined.stream([(0, 3), (3, 9)]), [(0, 3), (3, 9)], strict=True):
        assert digest_samples(found) == digest_samples(whole.fetch(start, stop))
    assert joined.digest() == Job("lenet", joined.spec).train_source().digest()
    assert joined.digest() != whole.digest()
    assert "images are train" in " ".join(ooc_ntk.plan(job, rates=None, out=tmp_path).notes)


def texts(*lengths: int) -> TextSource:
    """Texts of made-up tokens."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TextSource(TokenTable(np.arange(1, sum(lengths) + 1, dtype=np.int32), offsets, None, 0), None)


def test_texts_are_padded_alike():
    joined = JoinedSource([texts(2, 3), texts(5, 1)])
    assert joined.length == 5
    assert joined.lengths.tolist() == [2, 3, 5, 1]
    assert joined.fetch(1, 4).kwargs["input_ids"].shape == (3, 5)
    assert joined.padded(8).fetch(0, 4).kwargs["attention_mask"].sum(1).tolist() == [2, 3, 5, 1]
    assert joined.padded(8).digest() == joined.digest()
    with pytest.raises(InputError, match="is texts and"):
        JoinedSource([texts(2, 3), as_source({"input_ids": torch.zeros(2, 3), "attention_mask": torch.zeros(2, 3)})])
