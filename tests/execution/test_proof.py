"""The proof: a right kernel passes, one wrong tile does not, and the last step of a run keeps to time and memory."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk.cli import EXIT_FINDING
from ooc_ntk.errors import InputError, VerificationError
from ooc_ntk.execution import products, proof, proving, session
from ooc_ntk.execution.prepare import prepare
from ooc_ntk.execution.products import JacobianProducts, directions_held
from ooc_ntk.execution.proof import Prover
from ooc_ntk.execution.reference import Reference, plain_float64
from ooc_ntk.storage.local import file_stamp
from ooc_ntk.storage.reading import checksum_file
from tests import oracle
from tests.cases import TEST, TRAIN, case
from tests.execution.test_lengths import encoder, texts  # noqa: F401 - a fixture
from tests.execution.test_lengths import job as text_job
from tests.zoo import zoo_case

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
"""

EVERY = [
    {"kernel": "trace"},
    {"kernel": "pseudo", "scale": "mean"},
    {"kernel": "output:2"},
    {"kernel": "full"},
    {"kernel": "full", "normalize": "cosine", "scale": "mean"},
    {"kernel": "trace", "normalize": "cosine"},
    {"kernel": "trace", "outputs": "margin"},
    {"kernel": "embedding"},
    {"kernel": "trace", "by": "layer"},
    {"kernel": "trace", "projection": "sjlt:256"},
    {"kernel": "full", "projection": "rademacher:256", "normalize": "cosine"},
]


@pytest.fixture
def tmp_path(memory_path):
    """In memory, where there is such a folder: these runs sync often, and no power is lost here."""
    return memory_path


def name(options: object) -> str:
    return "-".join(map(str, options.values())) if isinstance(options, dict) else str(options)


def tiles(root, file="kernel.zarr"):
    return sorted(path.relative_to(root).as_posix() for path in (root / file / "c").rglob("*") if path.is_file())


def forge(root, path, factor=1.01, dtype="<f4"):
    """Scale a tile and write its new checksum into the manifest: nothing but mathematics can tell."""
    values = np.fromfile(root / path, dtype=dtype)
    (values * np.asarray(factor, dtype)).astype(dtype).tofile(root / path)
    with sqlite3.connect(root / "manifest") as database:
        changed = database.execute(
            "UPDATE files SET crc32c = ?, stamp = ? WHERE path = ?",
            (checksum_file(root / path), file_stamp(root / path), path),
        )
        assert changed.rowcount == 1


def checks(audit):
    return {check.name: check for check in audit.checks}


@pytest.mark.parametrize("options", EVERY, ids=name)
def test_a_right_kernel_passes_and_one_wrong_tile_does_not(options, compute):
    trained = options.get("outputs") == "margin"
    job = case("attention", trained=trained).job(**options)
    found = compute(job, tile_samples=7)
    audit = ooc_ntk.verify(found.path, job, full=True, samples=1)
    assert audit.passed, audit.checks
    assert audit.proof.coverage == 1.0
    assert (audit.proof.rows, audit.proof.columns) == (TRAIN + TEST, TRAIN)
    assert audit.proof.worst.error < audit.proof.worst.allowed / 3
    # Rows 28 to 32 are test samples, whose tiles no other mirrors; 0 to 6 are train samples.
    forge(found.path, "kernel.zarr/c/4/1")
    if "by" in options:  # the layers no longer add up, which is another check's business
        layers = [path for path in tiles(found.path, "layers.zarr") if path.endswith("/4/1")]
        assert len(layers) == len(found.layers)
        for path in layers:
            forge(found.path, path)
    audit = ooc_ntk.verify(found.path, job, full=True, samples=1)
    wrong = {check.name for check in audit.checks if not check.passed}
    assert any(name.startswith("K v against") for name in wrong), audit.checks
    others = {"entries recomputed in float64", "layers recomputed in float64"}
    assert wrong <= {"K v against J(Jᵀv)", "K v against Φ(Φᵀv)", *others}
    assert not audit.proof.passed


def test_wrong_features_are_found(compute):
    job = case("attention").job(projection="sjlt:256")
    found = compute(job, tile_samples=7, features_only=True)
    audit = ooc_ntk.verify(found.path, job, full=True, samples=1)
    assert audit.passed, audit.checks
    assert (audit.proof.columns, audit.proof.coverage) == (0, 1.0)
    forge(found.path, tiles(found.path, "features.zarr")[-1])
    audit = ooc_ntk.verify(found.path, job, full=True, samples=1)
    assert not checks(audit)["Φᵀv against Rᵀ(Jᵀv)"].passed


@pytest.mark.parametrize(
    ("network", "form"),
    [
        ("resnet", "by_forward_mode"),
        ("vit", "by_forward_mode"),
        ("lstm", "by_forward_mode"),
        ("dictionaries", "by_forward_mode"),
        ("uncovered", "by_double_backward"),  # a function of its own that has no forward mode
        ("stopped gradient", "by_double_backward"),  # torch.no_grad, which forward mode does not heed
        ("bags", "by_gradients"),  # differentiable once
    ],
)
def test_every_network_has_a_form_that_is_right(network, form, compute):
    chosen = zoo_case(network)
    found = compute(chosen.job())
    prover = Prover(found.path, found.plan, prepare(chosen.job()), 0)
    whole = prover.whole()
    assert whole.passed, str(whole)
    assert whole.worst.error < 1e-6
    assert prover._products._form.__name__ == form


@pytest.mark.parametrize("kind", ["trace", "pseudo", "output:2", "full"])
def test_products_are_those_of_the_kernel(kind, compute):
    chosen = case("smooth-mlp")
    job = chosen.job(kernel=kind, scale="mean")
    found = compute(job)
    width = found.plan.entries_per_sample
    wanted = oracle.kernel(oracle.case_jacobian("smooth-mlp"), TRAIN, kind, scale="mean")
    random = np.random.default_rng(0)
    columns, rows = np.array([0, 3, 4, 20]), np.array([1, 2, 25, 26, 30, 32])  # train and test
    vectors = random.normal(size=(len(columns), width, 3))
    places = [(index[:, None] * width + np.arange(width)).reshape(-1) for index in (rows, columns)]
    expected = wanted[np.ix_(*places)] @ vectors.reshape(-1, 3)
    for form, held, batch in (("by_forward_mode", 1, 1), ("by_double_backward", 4, 3), ("by_gradients", 30, 3)):
        made = JacobianProducts(Reference(prepare(job), found.plan), found.plan, batch, held)
        made._forms = [getattr(products, form)] if form != "by_gradients" else []
        with plain_float64():
            product = made(rows, columns, vectors)
        assert product.shape == (len(rows), width, 3)
        assert oracle.error(product.reshape(-1, 3), expected) < 1e-12
        assert made._form.__name__ == form


def test_texts_cut_at_their_longest(texts, compute):  # noqa: F811
    job = text_job(encoder(), texts)
    found = compute(job, tile_samples=6)
    assert found.plan.by_length
    audit = ooc_ntk.verify(found.path, job, full=True)
    assert audit.passed, audit.checks
    forge(found.path, "kernel.zarr/c/3/0")
    assert not ooc_ntk.verify(found.path, job, full=True, samples=1).proof.passed


class Mixed(nn.Module):
    """Takes the mean of the batch away from every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(torch.tanh(x - 0.5 * x.mean(0)))


def test_samples_that_depend_on_their_batch_go_one_by_one(compute):
    chosen = case("cnn")
    job = ooc_ntk.Job(model=Mixed().eval(), train=chosen.train, device="cpu", allow_batch_dependence=True)
    found = compute(job)
    assert ooc_ntk.verify(found.path, job, full=True).passed
    reference = Reference(prepare(job), found.plan)
    assert all(len(batch) == 1 for _, batch in reference.batches(np.arange(5), 4))


def test_a_wide_head_is_proven_by_every_output(compute):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 40)).eval()
    job = ooc_ntk.Job(model=net, train=case("cnn").train, device="cpu")
    found = compute(job)
    assert found.plan.head is not None
    audit = ooc_ntk.verify(found.path, job, full=True)
    assert audit.passed, audit.checks


def test_blocks_of_rows_are_judged_by_themselves(compute, monkeypatch):
    job = case("attention").job(test=False)
    found = compute(job, tile_samples=4)
    prover = Prover(found.path, found.plan, prepare(job), 0)
    forge(found.path, "kernel.zarr/c/5/1", 1.0 + 1e-3)
    together = prover.whole().worst.error
    monkeypatch.setattr(proof, "BLOCK_ROWS", 4)
    blocks = prover._blocks(np.arange(26))
    # The last two rows are too few to be judged alone.
    assert blocks == [*(slice(start, start + 4) for start in range(0, 20, 4)), slice(20, 26)]
    assert prover.whole().worst.error > 1.5 * together


def test_a_probe_grows_as_far_as_time_lasts(compute):
    job = case("smooth-mlp").job()
    found = compute(job)
    prover = Prover(found.path, found.plan, prepare(job), 3)
    least = prover.grown(0.0, 64)
    assert (least.rows, least.columns) == (2, 2)
    assert least.coverage == pytest.approx(4 / (33 * 26))
    every = prover.grown(1e9, 64)
    assert (every.rows, every.columns, every.coverage) == (33, 26, 1.0)
    ten = prover.grown(1e9, 10)
    assert (ten.rows, ten.columns) == (10, 10)
    assert f"10 × 10 samples by float64 vjp/jvp, {100 * 100 / (33 * 26):.2g}% of all entries" in str(ten)


def test_verify_probes_some_samples_and_info_says_so(compute):
    job = case("smooth-mlp").job()
    found = compute(job, tile_samples=7)
    audit = ooc_ntk.verify(found.path, job)
    assert audit.passed
    assert "K v against J(Jᵀv)" in checks(audit)
    kept = ooc_ntk.info(found.path).audited["proof"]
    assert kept["passed"]
    assert kept["by"] == "verify"
    assert kept["samples"] == [audit.proof.rows, audit.proof.columns]
    assert kept["plan"] == found.plan.digest
    with pytest.raises(InputError, match="samples=0"):
        ooc_ntk.verify(found.path, job, samples=0, full=True)


def test_directions_are_held_as_memory_allows(compute):
    plan = compute(case("smooth-mlp").job()).plan
    assert directions_held(plan, 0) == 1
    assert directions_held(plan, 3 * 8 * plan.columns) == 3


# --- the last step of a run ------------------------------------------------------------------------------------------


@pytest.fixture
def ample(monkeypatch):
    """Time and memory for a proof, whatever this process has taken already."""
    monkeypatch.setattr(proving, "TIME_SHARE", 1e6)
    monkeypatch.setattr(proving, "resident_bytes", lambda **_: -(2**40))


def run(out, lines, **options):
    job = case("smooth-mlp").job()
    return ooc_ntk.run(job, out, progress=ooc_ntk.api.Observer(say=lines.append), **options)


def never(*args, **options):
    raise AssertionError("nothing is to be proven")


def test_a_run_ends_with_a_proof_and_does_it_once(tmp_path, ample, monkeypatch):
    lines: list[str] = []
    run(tmp_path / "run", lines)
    assert len(lines) == 1
    assert lines[0].startswith("proof: 33 × 26 samples by float64 vjp/jvp, all entries, relative error ")
    seen = json.loads((tmp_path / "run/audit.json").read_text())
    assert seen["passed"]
    assert (seen["proof"]["by"], seen["proof"]["coverage"]) == ("run", 1.0)
    monkeypatch.setattr(proving, "Prover", never)
    run(tmp_path / "run", lines)
    assert len(lines) == 1


def test_a_proof_can_be_switched_off(tmp_path, ample, monkeypatch):
    monkeypatch.setattr(proving, "Prover", never)
    lines: list[str] = []
    run(tmp_path / "run", lines, proof=False)
    assert lines == []
    assert not (tmp_path / "run/audit.json").exists()


@pytest.mark.parametrize(
    ("what", "value", "said"),
    [
        ("SHORTEST_SECONDS", float("inf"), "a tenth of which is too short"),
        ("resident_bytes", lambda **_: 2**50, "proof left out: needs "),
    ],
)
def test_a_proof_that_does_not_fit_is_left_out(what, value, said, tmp_path, ample, monkeypatch):
    monkeypatch.setattr(proving, what, value)
    monkeypatch.setattr(proving, "Prover", never)
    lines: list[str] = []
    run(tmp_path / "run", lines)
    assert len(lines) == 1
    assert said in lines[0]
    assert "ooc-ntk verify" in lines[0]


def test_a_proof_that_would_take_too_long_is_left_out(tmp_path, ample, monkeypatch):
    monkeypatch.setattr(Prover, "least_seconds", lambda self: 1e12)
    monkeypatch.setattr(Prover, "grown", never)
    lines: list[str] = []
    run(tmp_path / "run", lines)
    assert lines[0].startswith("proof left out: two samples would take")


@pytest.fixture
def wrong(monkeypatch):
    """A run that writes one wrong tile."""
    right = session.execute

    def execute(plan, directory, *rest, **more):
        seconds = right(plan, directory, *rest, **more)
        if seconds:
            forge(directory.root, tiles(directory.root)[-1])
        return seconds

    monkeypatch.setattr(session, "execute", execute)


def test_a_wrong_kernel_is_refused_and_kept(tmp_path, ample, wrong):
    lines: list[str] = []
    with pytest.raises(VerificationError, match="not what float64 gradients say.*verify .*--full"):
        run(tmp_path / "run", lines)
    assert lines == []
    assert not ooc_ntk.info(tmp_path / "run").audited["passed"]
    assert ooc_ntk.open(tmp_path / "run").shape == (33, 26)
    with pytest.raises(VerificationError):  # and it does not become right by asking again
        run(tmp_path / "run", lines)
    run(tmp_path / "run", lines, proof=False)


def test_every_checkpoint_is_proven(tmp_path, ample):
    lines: list[str] = []
    job = case("smooth-mlp").job()
    state = job.module().state_dict()
    ooc_ntk.run_checkpoints(job, tmp_path / "all", [state, state], progress=ooc_ntk.api.Observer(say=lines.append))
    assert [line.partition(":")[0] for line in lines] == ["proof", "proof"]


def test_the_command_line_says_what_was_proven(cli, ample):
    done = cli("run", "--model", "nets.py:net", "--train", "digits[0:20]", "--device", "cpu", "--out", "r")
    assert done.exit_code == 0, done.output
    assert "proof: 20 × 20 samples by float64 vjp/jvp, all entries" in done.output
    info = cli("info", "r")
    assert "passed: 20 × 20 samples" in info.output
    assert "by run" in info.output
    checked = cli("verify", "r", "--full")
    assert checked.exit_code == 0, checked.output
    assert "products with vectors over 20 × 20 samples by float64 vjp/jvp, all entries" in checked.output
    quiet = cli("run", "--model", "nets.py:net", "--train", "digits[0:20]", "--device", "cpu", "--out", "q", "--quiet")
    assert quiet.output == ""
    without = cli("run", "--model", "nets.py:net", "--train", "digits[0:9]", "--out", "n", "--no-proof")
    assert "proof" not in without.output


def test_the_command_line_exits_with_a_finding(cli, ample, wrong):
    done = cli("run", "--model", "nets.py:net", "--train", "digits[0:20]", "--device", "cpu", "--out", "r", "-q")
    assert done.exit_code == EXIT_FINDING
    assert done.output.startswith("error: the kernel in r is not what float64 gradients say")
    assert len(done.output.splitlines()) == 1
