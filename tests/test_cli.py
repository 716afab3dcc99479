"""The command line as a user types it: tables, exit codes, errors that say what to do."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import ooc_ntk

NETS = """
import torch


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))


class Centred(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x):
        return self.net(x - x.mean(0))


def centred():
    return Centred()
"""


JOB = ("--model", "nets.py:small", "--train", "digits[0:60]", "--test", "digits[60:80]", "--device", "cpu")


def test_plan_says_what_how_and_how_much(cli):
    result = cli("plan", *JOB, "--host-memory", "4GiB", "--save", "plan.json")
    assert result.exit_code == 0, result.output
    for phrase in ("80 × 60 float32", "host memory", "of 4.0 GiB", "chosen", "pairwise", "all 2", "in eval mode"):
        assert phrase in result.output
    assert ooc_ntk.Plan.load("plan.json").kernel_shape == (80, 60)
    assert not Path("runs").exists()


def test_plan_as_json_is_the_plan(cli):
    result = cli("plan", *JOB, "--json")
    assert json.loads(result.stdout)["train_samples"] == 60


def test_run_info_verify_and_run_again(cli):
    assert cli("run", *JOB, "--out", "r", "--scheduler", "serial").exit_code == 0
    kernel = torch.from_numpy(ooc_ntk.open("r")[:])
    assert kernel.shape == (80, 60)
    shown = cli("info", "r")
    assert shown.exit_code == 0
    assert "promised" in shown.output
    assert "complete" in shown.output
    assert json.loads(cli("info", "r", "--json").stdout)["finished"] is True
    assert cli("verify", "r").exit_code == 0
    again = cli("run", "--out", "r")
    assert again.exit_code == 0, again.output
    assert "nothing to do" in again.output


def test_a_run_is_extended_and_says_what_it_was_grown_from(cli):
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    before = ooc_ntk.open("r")[:60, :60]
    result = cli("extend", "r", "--train", "digits[80:100]", "--disk", "1GiB")
    assert result.exit_code == 0, result.output
    assert "from 60 to 80 train samples" in result.output
    assert "ooc-ntk verify r" in result.output
    assert ooc_ntk.open("r").shape == (100, 80)
    assert (ooc_ntk.open("r")[:60, :60] == before).all()
    assert "nothing to do" in cli("extend", "r", "--train", "digits[80:100]").output
    assert cli("extend", "r", "--train", "digits[100:105] + digits[0:2]", "--quiet").output == ""
    shown = cli("info", "r").output
    assert "from 60 to 80 train samples" in shown
    assert "from 80 to 87 train samples" in shown
    assert cli("verify", "r").exit_code == 0
    assert cli("run", "--out", "r", "--quiet").exit_code == 0
    for arguments, words in (
        (("digits[0:5]", "--model", "nets.py:centred"), ["another job: model", "only the same model"]),
        (("mnist5k[0:5]",), ["do not join", "(1, 28, 28)"]),
        (("CIFAR-10_0_2500_0_1000",), ["names test data"]),
        (("digits[0:5]", "--weights", "a.pt", "b.pt"), ["one set of weights"]),
        (("digits[0:5]", "--disk", "9KiB"), ["at once", "raise --disk"]),
        (("digits[5:5]",), ["holds no sample"]),
        (("digits[0:5]", "--test", "digits[0:5]"), ["--test"]),
    ):
        result = cli("extend", "r", "--train", *arguments)
        assert result.exit_code == 2, result.output
        for word in words:
            assert word in result.output
    assert ooc_ntk.open("r").shape == (107, 87)


def test_a_kernel_that_does_not_verify_exits_with_1(cli):
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    tile = next(Path("r/kernel.zarr/c").rglob("0/0"))
    content = bytearray(tile.read_bytes())
    content[5] ^= 255
    tile.write_bytes(content)
    result = cli("verify", "r")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "kernel.zarr/c/0/0" in result.output
    repaired = cli("run", "--out", "r")
    assert repaired.exit_code == 0
    assert "kernel.zarr/c/0/0" in repaired.output
    assert cli("verify", "r").exit_code == 0


def test_a_run_of_live_objects_is_verified_with_the_model_given(cli):
    sys.path.insert(0, ".")
    try:
        import nets
    finally:
        sys.path.pop(0)
    net = nets.small().eval()
    torch.nn.init.constant_(net[1].bias, 0.3)
    ooc_ntk.run(ooc_ntk.Job(net, "digits[0:40]", device="cpu"), "live", progress=False)
    result = cli("verify", "live")
    assert result.exit_code == 2
    assert "--model" in result.output
    assert cli("verify", "live", "--model", "nets.py:small").exit_code == 0


@pytest.mark.parametrize("representation", ["dense", "factored", "pairwise"])
def test_a_representation_may_be_asked_for(cli, representation):
    plan = json.loads(cli("plan", *JOB, "--representation", representation, "--json").stdout)
    expected = {"dense": ("dense", "gemm"), "factored": ("factored", "gemm"), "pairwise": ("factored", "pairwise")}
    assert {(b["representation"], b["contraction"]) for b in plan["blocks"]} == {expected[representation]}


def test_layer_rules_may_be_left_out(cli):
    plan = json.loads(cli("plan", *JOB, "--no-layer-rules", "--json").stdout)
    assert {block["source"] for block in plan["blocks"]} == {"torch.func"}
    assert {block["representation"] for block in plan["blocks"]} == {"dense"}


def test_a_plan_in_bf16_holds_half_the_bytes(cli):
    held = {
        name: sum(block["held_bytes"] for block in json.loads(cli("plan", *JOB, *flags, "--json").stdout)["blocks"])
        for name, flags in {"float32": (), "bf16": ("--precision", "bf16")}.items()
    }
    assert held["bf16"] == held["float32"] / 2


def test_outputs_that_change_with_their_batch_are_refused_unless_allowed(cli):
    job = ("--model", "nets.py:centred", "--train", "digits[0:12]", "--device", "cpu")
    refused = cli("plan", *job)
    assert refused.exit_code == 2
    assert "allow_batch_dependence" in refused.output
    allowed = cli("plan", *job, "--allow-batch-dependence", "--json")
    assert json.loads(allowed.stdout)["batch_size"] == 1
    assert cli("run", *job, "--allow-batch-dependence", "--out", "r", "--quiet").exit_code == 0
    again = cli("run", "--out", "r")
    assert (again.exit_code, "nothing to do" in again.output) == (0, True), again.output
    assert cli("verify", "r").exit_code == 0


def test_phases_of_a_run_are_shown(cli):
    shown = cli("run", *JOB, "--out", "r", "--profile")
    assert shown.exit_code == 0, shown.output
    for phase in ("where the time went", "capture", "commit", "between phases"):
        assert phase in shown.output
    assert "where the time went" in cli("info", "r", "--profile").output
    info = ooc_ntk.info("r")
    assert {"capture", "pairwise", "commit"} <= set(info.phases)
    assert list(info.phases.values()) == sorted(info.phases.values(), reverse=True)
    assert 0 < sum(info.phases.values()) <= info.seconds
    assert json.loads(cli("info", "r", "--json").stdout)["measured"]["phases"] == info.phases


FOLLOWED = ("--representation", "factored", "--tile-samples", "1000", "--dataflow", "resident")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((), ("--representation", "factored"), ["factored", "--representation"]),
        (FOLLOWED, ("--representation", "dense"), ["dense", "--representation"]),
        ((), ("--no-layer-rules",), ["--no-layer-rules"]),
        ((), ("--allow-batch-dependence",), ["--allow-batch-dependence", "batches of"]),
        (FOLLOWED, ("--dataflow", "spill"), ["dataflow resident", "spill"]),
        (FOLLOWED, ("--tile-samples", "20"), ["tile_samples 80", "20"]),
    ],
)
def test_flags_that_the_plan_that_is_there_does_not_follow_are_refused(cli, first, second, words):
    assert cli("run", *JOB, *first, "--out", "r", "--quiet").exit_code == 0
    again = cli("run", *JOB, *first, "--out", "r")  # the same command goes on
    assert (again.exit_code, "nothing to do" in again.output) == (0, True), again.output
    result = cli("run", *JOB, *second, "--out", "r")
    assert result.exit_code == 2, result.output
    for word in words:
        assert word in result.output
    cli("plan", *JOB, *first, "--save", "plan.json")
    assert cli("run", *JOB, *second, "--plan", "plan.json", "--out", "other").exit_code == 2
    assert not Path("other/kernel.zarr").exists()


@pytest.mark.parametrize("command", ["plan", "run"])
def test_help_names_every_choice_and_its_default(cli, command):
    shown = " ".join(cli(command, "--help").output.replace("│", " ").split())
    for phrase in (
        "float32, bf16x3 (three bf16 products in place of one), bf16 (for held tiles and products), tf32 (CUDA) or "
        "float64. (default: float32)",
        "dense, factored or pairwise, wherever a block allows it. (default: planned for each block)",
        "--no-layer-rules",
        "--allow-batch-dependence",
        "(default: 80% of what is free)",
    ):
        assert phrase in shown


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--precision", {"float32", "bf16x3", "bf16", "tf32", "float64"}),
        ("--representation", {"dense", "factored", "pairwise"}),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_tab_completion_offers_every_choice(command, option, names):
    words = f"ooc-ntk {command} {option} "
    environment = {**os.environ, "_OOC_NTK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    result = subprocess.run(
        [Path(sys.executable).with_name("ooc-ntk")], env=environment, capture_output=True, text=True, check=False
    )
    assert set(result.stdout.split()) == names


def test_flags_override_the_job_file(cli):
    Path("job.toml").write_text(
        'model = "nets.py:small"\ntrain = "digits[0:20]"\nkernel = "pseudo"\n[budget]\nhost = "3GiB"\n'
    )
    plan = json.loads(cli("plan", "job.toml", "--kernel", "trace", "--json").stdout)
    assert (plan["kernel"], plan["limits"]["host"]) == ("trace", 3 * 2**30)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "--train", "digits"), ["model"]),
        (("plan", "--model", "nets.py:large", "--train", "digits"), ["large", "small"]),
        (("plan", "--model", "nets.py:small", "--train", "digit"), ["digit", "digits"]),
        (("plan", *JOB, "--kernel", "trase"), ["trase", "trace"]),
        (("plan", *JOB, "--kernel", "output:10"), ["output:10", "0 to 9"]),
        (("plan", *JOB, "--host-memory", "10MiB"), ["10.0 MiB", "--host-memory to"]),
        (("plan", *JOB, "--host-memory", "lots"), ["lots", "16GiB"]),
        (("plan", *JOB, "--parameters", "layer4.*"), ["layer4.*", "weight"]),
        (("plan", *JOB, "--dataflow", "spil"), ["spil", "spill"]),
        (("plan", *JOB, "--representation", "factord"), ["factord", "factored"]),
        (("plan", *JOB, "--precision", "bf61"), ["bf61", "bf16"]),
        (("plan", *JOB, "--allow-batch-dependence", "--batch-size", "4"), ["batch_size=4", "alone"]),
        (("plan", "missing.toml"), ["missing.toml"]),
        (("run", *JOB, "--out", "r", "--scheduler", "tcp:/host:1"), ["tcp:/host:1", "threads", "tcp://HOST:PORT"]),
        (("info", "nowhere"), ["nowhere", "no run"]),
        (("verify", "nowhere"), ["nowhere"]),
        (("extend", "nowhere", "--train", "digits"), ["nowhere", "no run"]),
        (("extend", "nowhere"), ["--train"]),
    ],
)
def test_wrong_input_exits_with_2_and_says_what_to_do(cli, arguments, words):
    result = cli(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output
    assert not Path("r/kernel.zarr").exists()


def test_another_job_in_the_same_directory_is_refused(cli):
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    before = sorted(
        (path, path.stat().st_mtime_ns) for path in Path("r").rglob("*") if path.is_file() and path.name != "lock"
    )
    result = cli("run", "--model", "nets.py:small", "--train", "digits[0:50]", "--out", "r")
    assert result.exit_code == 2
    assert "data" in result.output
    after = sorted(
        (path, path.stat().st_mtime_ns) for path in Path("r").rglob("*") if path.is_file() and path.name != "lock"
    )
    assert before == after


def test_nothing_heavy_is_imported_before_it_is_used():
    heavy = "('torch', 'numpy', 'zarr', 'dask', 'scipy')"
    code = f"import sys, ooc_ntk, ooc_ntk.cli; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_version_is_printed():
    result = subprocess.run([sys.executable, "-m", "ooc_ntk", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"ooc-ntk {version('ooc-ntk')}\n"


def test_python_dash_m_is_the_command():
    result = subprocess.run([sys.executable, "-m", "ooc_ntk", "--help"], capture_output=True, text=True, check=True)
    for command in ("plan", "run", "info", "verify", "calibrate", "demo"):
        assert command in result.stdout
