"""The benchmark runs, its contenders agree and its table is complete. Nothing is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.exact import main
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.execution.calibration import rates_path
from ooc_ntk.planning.rates import MachineRates
from tests.cases import KINKED

ROOT = Path(__file__).parents[1]
CONTENDERS = ["per-sample loop", "torch.func tutorial", "ooc-ntk, run", "ooc-ntk, plan + run"]
WORKLOADS = ["mlp", "resnet18", "vit"]


def test_contenders_agree_and_the_table_is_complete(tmp_path: Path, rates: MachineRates) -> None:
    with limited_threads(1):  # more threads than free cores would make tiny products take minutes
        rates_path("cpu").write_text(rates.to_json())
    record = tmp_path / "exact.json"
    command = [sys.executable, "-m", "bench.exact", "--smoke", "--threads", "1", "--json", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    found = json.loads(record.read_text())
    assert [workload["workload"] for workload in found["workloads"]] == WORKLOADS
    for workload in found["workloads"]:
        assert [row["contender"] for row in workload["rows"]] == CONTENDERS
        for row in workload["rows"]:
            assert 0 <= row["error"] <= KINKED, (workload["title"], row)
            assert 0 <= row["disagreement"] <= KINKED, (workload["title"], row)
            assert row["seconds"] > 0
            assert row["ratio"] > 0
        assert f"\n{workload['title']}\n" in done.stdout
    for name in CONTENDERS:
        assert done.stdout.count(f"\n  {name} ") == len(WORKLOADS)
    assert done.stdout.count("ooc-ntk / faster peer = ") == len(WORKLOADS)


def test_unknown_workload_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--workloads", "mpl"])
    assert stopped.value.code == 2
    assert "unknown workload 'mpl'" in capsys.readouterr().err
