"""Playing the parts of ``python -m bench``, each in a process of its own that its time limit ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .bars import Check
from .exact import machine
from .process import ROOT, calibrate_once, end_tree
from .records import Finding, Record, from_line, to_line
from .registry import Part


@dataclass(frozen=True)
class Played:
    """What became of a part.

    Attributes:
        name: of the part.
        setting: date, machine, versions, and the load before it.
        smoke: whether in smoke size.
        seconds: that it took.
        findings: what it gave back, until it ended or was ended.
        failure: why it did not come to its end; "" if it did.
    """

    name: str
    setting: dict[str, str | int]
    smoke: bool
    seconds: float
    findings: tuple[Finding, ...]
    failure: str = ""

    @property
    def records(self) -> list[Record]:
        """Its records."""
        return [finding for finding in self.findings if isinstance(finding, Record)]

    @property
    def checks(self) -> list[Check]:
        """Its checks."""
        return [finding for finding in self.findings if isinstance(finding, Check)]

    @property
    def text(self) -> list[str]:
        """Its lines of text."""
        return [finding for finding in self.findings if isinstance(finding, str)]

    def to_json(self) -> dict[str, Any]:
        """For :meth:`from_json`."""
        return {**asdict(self), "findings": [json.loads(to_line(finding)) for finding in self.findings]}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Played:
        """Read what :meth:`to_json` gave."""
        findings = tuple(from_line(json.dumps(finding)) for finding in given["findings"])
        return cls(**{**given, "findings": findings})


def play(parts: Sequence[Part], smoke: bool, patience: float = 1.0) -> list[Played]:
    """Play parts in one process, and end it with all its children when their time is up.

    Args:
        parts: one; in smoke size several, which share what importing takes.
        smoke: whether in smoke size.
        patience: factor of their time limits.

    Returns:
        What became of each.
    """
    setting = {**machine(torch.get_num_threads()), "load": f"{os.getloadavg()[0]:.1f}"}
    limit = patience * sum(part.limit_seconds for part in parts)
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        command = [sys.executable, "-m", "bench", "--child", folder, "--parts", ",".join(part.name for part in parts)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen(
            [*command, *(["--smoke"] if smoke else [])],
            cwd=ROOT,
            env=environment,
            stdout=2,  # what parts print is progress
            start_new_session=True,
        )
        ended = ""
        try:
            status = process.wait(limit)
            if status:
                ended = f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s, its time limit"
        finally:
            if process.poll() is None:
                end_tree(process.pid)
                process.wait()
            with suppress(ProcessLookupError):  # what it left behind
                os.killpg(process.pid, signal.SIGKILL)
        return [_read(Path(folder), part, setting, smoke, ended) for part in parts]


def _read(folder: Path, part: Part, setting: dict[str, str | int], smoke: bool, ended: str) -> Played:
    lines: list[str] = []
    with suppress(OSError):
        lines = (folder / f"{part.name}.jsonl").read_text().split("\n")[:-1]  # a line that was cut short has no end
    findings = tuple(from_line(line) for line in lines)
    try:
        told = json.loads((folder / f"{part.name}.end").read_text())
    except OSError:
        told = {"seconds": part.limit_seconds if "time limit" in ended else 0.0, "failure": ended or "it told no end"}
    return Played(part.name, setting, smoke, told["seconds"], findings, told["failure"])


def play_here(parts: Sequence[Part], smoke: bool, folder: Path) -> None:
    """Body of a child process: play parts, and leave findings in a folder as they come.

    Args:
        parts: one after another; one that raises does not stop the next.
        smoke: whether in smoke size.
        folder: takes ``NAME.jsonl``, and ``NAME.end`` with seconds and failure.
    """
    calibrate_once()
    for part in parts:
        start, failure = time.perf_counter(), ""
        with (folder / f"{part.name}.jsonl").open("w") as file:
            try:
                for finding in part.measure(smoke):
                    file.write(to_line(finding) + "\n")
                    file.flush()
            except Exception as error:  # noqa: BLE001 - whatever it is, the other parts are measured all the same
                traceback.print_exc()
                failure = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        told = {"seconds": time.perf_counter() - start, "failure": failure}
        (folder / f"{part.name}.end").write_text(json.dumps(told))


def clock() -> str:
    """The time of day, for progress."""
    return datetime.now().astimezone().strftime("%H:%M:%S")
