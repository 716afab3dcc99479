"""Worker processes on the command line: what is refused, what is planned, and a run that is stopped and goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import ooc_ntk
from ooc_ntk.cli import EXIT_TERMINATED
from ooc_ntk.cli.terminal import EXIT_STOPPED
from ooc_ntk.units import parse_bytes

#: A model whose workers dawdle over every batch while a file asks them to.
NETS = """
import time
from pathlib import Path

import torch

SLOW = Path(__file__).with_name("slow")


class Net(torch.nn.Sequential):
    def forward(self, x):
        if SLOW.exists():
            time.sleep(0.3)
        return super().forward(x)


def small():
    torch.manual_seed(0)
    return Net(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10)).eval()
"""

JOB = ("--model", "nets.py:small", "--train", "digits[0:60]", "--test", "digits[60:80]", "--device", "cpu")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices here")


@pytest.mark.parametrize("command", [("plan",), ("run", "--out", "r")])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workers", "0"), ["from 1 to 1024", "got 0"]),
        (("--workers", "-3"), ["from 1 to 1024", "got -3"]),
        (("--workers", "2", "--dataflow", "resident"), ["'resident'", "memory of one process", "'spill'"]),
        (("--workers", "2", "--host-memory", "300MiB"), ["for 2 worker processes", "the budget is 300 MiB"]),
        pytest.param(("--devices", "all"), ["'all'", "torch sees none here", "--workers"], marks=NO_CUDA),
        (("--devices", "0", "--workers", "2"), ["got workers and devices"]),
    ],
)
def test_wrong_workers_exit_with_2_and_one_line(cli, command, arguments, words):
    refused(cli(*command, *JOB, *arguments), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workers", "2", "--scheduler", "serial"), ["--scheduler serial", "leave it out", "--workers"]),
        (("--workers", "2", "--scheduler", "tcp://127.0.0.1:9"), ["got scheduler and workers"]),
        (("--scheduler", "nonsense://"), ["'nonsense://'", "'tcp://host:8786'"]),
        (("--scheduler", "nonsense"), ["'nonsense'", "threads", "serial", "tcp://HOST:PORT"]),
        (("--performance-report", "report.html"), ["--performance-report", "--workers", "--scheduler"]),
        (("--scheduler", "serial", "--performance-report", "report.html"), ["--performance-report", "--workers"]),
        (("--workers", "2", "--performance-report", "nowhere/r.html"), ["nowhere/r.html", "a folder that exists"]),
        (("--workers", "2", "--performance-report", "."), ["cannot be written there"]),
    ],
)
def test_wrong_executors_exit_with_2_and_one_line(cli, arguments, words):
    refused(cli("run", *JOB, "--out", "r", *arguments), words)


def refused(result, words):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (said,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert said.startswith("error: ")
    for word in words:
        assert word in said
    assert not Path("r").exists()


def test_a_scheduler_that_is_not_there_leaves_nothing_behind(cli, monkeypatch):
    monkeypatch.setattr("ooc_ntk.execution.cluster.start.CONNECT_SECONDS", 0.5)
    refused(
        cli("run", *JOB, "--out", "r", "--scheduler", "tcp://127.0.0.1:9", "--quiet"),
        ["no Dask scheduler answers at tcp://127.0.0.1:9", "'dask scheduler'", "leave --scheduler out"],
    )
    assert cli("run", *JOB, "--out", "r", "--quiet", "--scheduler", "serial").exit_code == 0


def test_extend_reaches_the_scheduler_before_it_begins(cli, monkeypatch):
    monkeypatch.setattr("ooc_ntk.execution.cluster.start.CONNECT_SECONDS", 0.5)
    assert cli("run", *JOB, "--out", "r", "--quiet").exit_code == 0
    result = cli("extend", "r", "--train", "digits[80:90]", "--scheduler", "tcp://127.0.0.1:9", "--quiet")
    assert result.exit_code == 2, result.output
    assert "no Dask scheduler answers" in result.output
    assert not list(Path().glob("r.*/plan.json")) + list(Path().glob("*next*/plan.json"))
    assert cli("extend", "r", "--train", "digits[80:90]", "--quiet").exit_code == 0


def test_the_budget_that_an_error_names_suffices_when_it_is_typed_in(cli):
    small = cli("plan", *JOB, "--workers", "2", "--host-memory", "300MiB")
    (enough,) = re.findall(r"--host-memory to (\d+MiB) or more", small.output)
    plan = json.loads(cli("plan", *JOB, "--workers", "2", "--host-memory", enough, "--json").stdout)
    assert plan["promised"]["host_bytes"] <= parse_bytes(enough) == plan["limits"]["host"]
    alone = json.loads(cli("plan", *JOB, "--host-memory", enough, "--json").stdout)
    assert 2 * alone["promised"]["host_bytes"] < plan["promised"]["host_bytes"], "three processes take more than two"


def test_a_plan_promises_what_all_processes_take(cli):
    arguments = ("plan", *JOB, "--workers", "2", "--host-memory", "12GiB", "--dataflow", "spill")
    shown = cli(*arguments)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"host memory +\d.* of 12\.0 GiB, [\d.]+ [MG]iB in each of 2 worker processes", shown.output)
    assert "in each of 2 worker processes" in next(line for line in shown.output.splitlines() if "rows by" in line)
    plan = ooc_ntk.Plan.from_json(cli(*arguments, "--json").stdout)
    assert plan.workers == 2
    driver = plan.promised.host_bytes - 2 * plan.process_bytes
    assert 2**27 < driver < plan.promised.host_bytes / 2
    assert plan.threads == max(1, torch.get_num_threads() // 2), "workers share the cores"


def test_a_plan_for_one_process_is_refused(cli):
    assert cli("plan", *JOB, "--dataflow", "resident", "--save", "plan.json").exit_code == 0
    result = cli("run", *JOB, "--plan", "plan.json", "--workers", "2", "--out", "r", "--quiet")
    refused(result, ["in the memory of one process (dataflow resident)", "leave --workers", "another --out"])


def test_a_run_is_not_gone_on_with_by_more_workers_than_the_budget_holds(cli):
    spilled = (*JOB, "--dataflow", "spill")
    assert cli("run", *spilled, "--out", "r", "--quiet").exit_code == 0
    before = Path("r/plan.json").read_bytes()
    again = ("run", *spilled, "--out", "r", "--workers", "2", "--host-memory")
    small = cli(*again, "500MiB")
    assert small.exit_code == 2, small.output
    assert "with 2 worker processes, the budget is 500 MiB; raise --host-memory to" in small.output
    (enough,) = re.findall(r"--host-memory to (\d+MiB) or more", small.output)
    assert cli(*again, enough, "--quiet").exit_code == 0
    assert Path("r/plan.json").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "option", "names"),
    [
        ("run", "--scheduler", {"threads", "serial", "tcp://"}),
        ("extend", "--scheduler", {"threads", "serial", "tcp://"}),
        ("run", "--devices", {"all", "0", "0,1"}),
        ("plan", "--devices", {"all", "0", "0,1"}),
    ],
)
def test_tab_completion_offers_where_tasks_may_run(command, option, names):
    words = f"ooc-ntk {command} {option} "
    environment = {**os.environ, "_OOC_NTK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    code = "import sys; sys.argv = ['ooc-ntk']; from ooc_ntk.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert set(result.stdout.split()) == names, result.stderr


@pytest.mark.parametrize("command", ["plan", "run", "extend"])
def test_help_has_a_section_of_where(cli, command):
    shown = cli(command, "--help").output
    assert "Where it is computed" in shown
    assert "--workers" in shown
    assert ("--performance-report" in shown) == (command != "plan")


@pytest.mark.grid
def test_signals_stop_workers_in_time_and_the_same_command_goes_on(cli, tmp_path, one_thread):
    job = ("--model", f"{tmp_path}/nets.py:small", "--train", "digits[0:60]", "--device", "cpu", "--batch-size", "2")
    there = ooc_ntk.Job(model=f"{tmp_path}/nets.py:small", train="digits[0:60]", device="cpu", batch_size=2)
    out, report = tmp_path / "run", tmp_path / "report.html"
    preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=6, workers=2)
    made = ooc_ntk.plan(there, ooc_ntk.Budget("8GiB", disk="1GiB"), preferences=preferences)
    made.save(tmp_path / "plan.json")
    command = ("run", *job, "--workers", "2", "--plan", tmp_path / "plan.json", "--out", out)

    (tmp_path / "slow").touch()
    for number, code in ((signal.SIGINT, EXIT_STOPPED), (signal.SIGTERM, EXIT_TERMINATED)):
        before = len(keys(out))
        with (tmp_path / "log").open("wb") as log:
            words = [sys.executable, "-m", "ooc_ntk", *map(str, command), "-q"]
            child = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 120
            while len(keys(out)) < before + 2:
                assert child.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.02)
            processes = psutil.Process(child.pid).children(recursive=True)
            assert len(processes) >= 2
            os.killpg(child.pid, number)  # all of them, as a terminal and SLURM do
            sent = time.monotonic()
            child.wait(60)
            took = time.monotonic() - sent
        finally:
            child.kill()
            child.wait()
        said = (tmp_path / "log").read_text()
        assert child.returncode == code, said
        assert took < 10
        assert "finished tiles are kept" in said
        assert "Traceback" not in said
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive
    done = keys(out)
    assert not ooc_ntk.info(out).finished

    (tmp_path / "slow").unlink()
    again = cli(*command, "--performance-report", report)
    assert again.exit_code == 0, again.output
    assert re.search(r"dashboard: http://127\.0\.0\.1:\d+/status", again.output)
    assert "Dask Performance Report" in report.read_text()
    assert keys(out)[: len(done)] == done
    assert len(keys(out)) == len(set(keys(out))) == made.task_count, "nothing that was finished was done again"
    reference = ooc_ntk.run(there, tmp_path / "reference", plan=made, scheduler="serial", progress=False)
    assert np.asarray(ooc_ntk.open(out)).tobytes() == np.asarray(reference).tobytes()
    assert list(out.rglob("*.tmp-*")) == []


def keys(out):
    """Of the tasks that are committed, in that order."""
    log = out / "receipts.jsonl"
    return [json.loads(line)["key"] for line in log.read_text().splitlines()] if log.exists() else []
