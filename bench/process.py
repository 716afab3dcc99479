"""Measuring in a process of its own, so that memory peaks and warm-up are a contender's own.

The child builds model and data from a seed, computes the kernel of one sample to warm up, then computes the kernel
once, timed, and leaves figures and kernel in a folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import torch

import ooc_ntk
from ooc_ntk.compute.rates import cached_rates

from .contenders import CONTENDERS, DENSE, DEVICE, OURS
from .floors import Floors, measure_floors
from .inputs import take
from .models import build
from .peers import Refused, Result

#: How a measurement is told that its time limit ended.
STOPPED = "stopped"
NOT_BEGUN = f"{STOPPED} before it computed"

#: What a task names to have the floors measured.
FLOORS = "floors"

#: Seconds that a limited process gets for starting and warming up, beside those for computing (guessed: Python, torch
#: and a peer's package take 2 to 6 here, and a peer that needs minutes for one sample is no peer).
STARTING_SECONDS = 60.0

#: The repository, from which children start.
ROOT = Path(__file__).parents[1]

#: By what libraries are told how many threads to take.
THREADS_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

#: A process that imports what every contender needs, and computes nothing, forks those that measure: importing takes
#: longer than most of them compute.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["bench.process"])

#: What a process that measures writes to stderr.
SAID = "said"


@dataclass(frozen=True)
class Case:
    """A workload at one sample count."""

    workload: str
    samples: int

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"{self.workload}-{self.samples}"


@dataclass(frozen=True)
class Task:
    """What one child process measures.

    Attributes:
        contender: its name, or :data:`FLOORS`.
        cases: one, or several one after another (then the memory peak is that of all before, too).
        smoke: whether in smoke size, which is not warmed up.
        threads: CPU threads.
        limit_seconds: of computing, after which the process is ended, whatever its start took (at most
            :data:`STARTING_SECONDS`); None waits for it.
        here: in this process instead, in smoke size.
    """

    contender: str
    cases: tuple[Case, ...]
    smoke: bool
    threads: int
    limit_seconds: float | None = None
    here: bool = False


@dataclass(frozen=True)
class Measurement:
    """One contender on one case, as its child process reports it.

    Attributes:
        result: kernel and times.
        cpu_seconds: processor time of all its threads, plan included.
        peak_bytes: highest resident memory of the process (VmHWM).
        load: load average of the machine over the last minute, before it started.
        promised: of a contender that plans, what its plan promised: ``seconds``, ``host_bytes``; and ``moved_bytes``,
            which its run read and wrote.
    """

    result: Result
    cpu_seconds: float
    peak_bytes: int
    load: float
    promised: dict[str, float] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        """Wall clock, plan included."""
        return self.result.plan_seconds + self.result.run_seconds


def run_seconds(outcome: Measurement | str) -> float | None:
    """Seconds that a contender computed: to its end, or until it was stopped; None if it did not compute.

    >>> run_seconds("stopped after 3.1 s of computing")
    3.1
    >>> run_seconds("refuses: a layer that it does not know")
    """
    if isinstance(outcome, Measurement):
        return outcome.result.run_seconds
    found = re.fullmatch(rf"{STOPPED} after ([\d.]+) s of computing", outcome)
    return float(found[1]) if found else None


def measure_here(task: Task, folder: Path) -> None:
    """Body of a child process: measure, and leave ``<case>.json`` and ``<case>.npy`` in a folder.

    Args:
        task: what to measure.
        folder: where to leave it.
    """
    torch.set_num_threads(task.threads)
    for case in task.cases:
        model, inputs = build(case.workload, case.samples, task.smoke)
        found: dict[str, object]
        if task.contender == FLOORS:
            found = asdict(measure_floors(model, inputs))
        else:
            try:
                compute = CONTENDERS[task.contender]
                if not task.smoke:
                    compute(model, take(inputs, slice(0, 1)))
                _write(folder / f"{case.stem}.started", str(time.time()))
                start = time.process_time()
                with _promises() as promised:
                    result = compute(model, inputs)
            except Refused as refusal:
                found = {"refusal": str(refusal)}
            else:
                cpu_seconds = time.process_time() - start
                figures = asdict(result)
                np.save(folder / f"{case.stem}.npy", figures.pop("kernel"))
                found = {**figures, "cpu_seconds": cpu_seconds, "peak_bytes": peak_resident_bytes()}
                found["promised"] = promised
        _write(folder / f"{case.stem}.json", json.dumps(found))


def _write(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all."""
    staged = path.with_name(f"{path.name}.part")
    staged.write_text(text)
    os.replace(staged, path)


@contextmanager
def _promises() -> Iterator[dict[str, float]]:
    """What the last plan that is made in the body promises, and what its run moves: a contender gives a kernel only."""
    found: dict[str, float] = {}
    plan, info = ooc_ntk.plan, ooc_ntk.info

    def planned(*arguments: object, **named: object) -> ooc_ntk.Plan:
        made = plan(*arguments, **named)  # type: ignore[arg-type]
        found.update(seconds=made.promised.seconds, host_bytes=made.promised.host_bytes)
        return made

    def told(*arguments: object, **named: object) -> object:
        run = info(*arguments, **named)  # type: ignore[arg-type]
        found.update(moved_bytes=run.bytes_read + run.bytes_written)
        return run

    with patch.object(ooc_ntk, "plan", planned), patch.object(ooc_ntk, "info", told):
        yield found


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far (VmHWM; Linux only, elsewhere 0).

    Of a process that was forked off, with the pages of files (torch's code) that it would have had to read, had it been
    begun anew: it counts those that it touched alone.
    """
    peak = _status_bytes("self", "VmHWM")
    if multiprocessing.parent_process() is not None:
        peak += max(0, _status_bytes(str(os.getppid()), "RssFile") - _status_bytes("self", "RssFile"))
    return peak


def _status_bytes(process: str, name: str) -> int:
    """A size that Linux tells of a process; 0 elsewhere."""
    try:
        status = Path("/proc", process, "status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:")), 0)


def measure_apart(task: Task) -> dict[Case, Measurement | str]:
    """Measure a contender in a fresh process.

    Args:
        task: what to measure.

    Returns:
        By case the measurement, or in one line why there is none.

    Raises:
        RuntimeError: if the process of ooc-ntk fails; that of a peer may, and its end is what is returned.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        place, ended = Path(folder), ""
        try:
            _measure(task, folder, task.limit_seconds)
        except subprocess.TimeoutExpired as late:
            ended = f"{STOPPED} after {late.timeout:.1f} s of computing" if late.timeout else NOT_BEGUN
        except RuntimeError as error:
            if task.contender in (OURS, DENSE):
                names = ", ".join(case.stem for case in task.cases)
                raise RuntimeError(f"{task.contender} on {names}: {error}") from error
            ended = str(error)
        told = ended or "its process left nothing"
        return {case: _read(place, case, load) or _unfinished(place, case, told) for case in task.cases}


def _unfinished(folder: Path, case: Case, ended: str) -> str:
    """Why a case has no measurement: how its process ended, but of a case that it had not come to."""
    return ended if not ended.startswith(STOPPED) or _begun(folder, case) else NOT_BEGUN


def _begun(folder: Path, *cases: Case) -> float | None:
    """When the last of these cases that was begun began, in seconds since the epoch."""
    found = [folder / f"{case.stem}.started" for case in cases]
    return max((float(path.read_text()) for path in found if path.exists()), default=None)


def _measure(task: Task, folder: str, limit_seconds: float | None = None) -> None:
    """Measure in a fresh process, or here."""
    if not task.here:
        _measure_forked(task, folder, limit_seconds)
        return
    try:
        measure_here(task, Path(folder))
    except Exception as error:  # whatever a peer raises; it must not end the others
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _measure_forked(task: Task, folder: str, limit_seconds: float | None) -> None:
    """Measure in a process that is forked off one that has imported torch and computed nothing.

    Raises:
        RuntimeError: if it ends with another status than 0, with the last line that it said.
        subprocess.TimeoutExpired: if it takes longer; its timeout is what it had computed then, 0 before it began.
    """
    environment = {**os.environ, **dict.fromkeys(THREADS_VARIABLES, str(task.threads))}
    process = FORKS.Process(target=_child, args=(task, folder, environment))
    process.start()
    assert process.pid is not None
    started = time.time()
    try:
        while process.exitcode is None:
            since, now = _begun(Path(folder), *task.cases), time.time()
            if limit_seconds is not None:
                if since is None and now > started + STARTING_SECONDS:
                    raise subprocess.TimeoutExpired(task.contender, 0.0)
                if since is not None and now > since + limit_seconds:
                    raise subprocess.TimeoutExpired(task.contender, now - since)
            process.join(0.1)
    finally:
        if process.exitcode is None:
            end_tree(process.pid)
            process.join()
    file = Path(folder, SAID)
    said = file.read_text(errors="replace") if file.exists() else ""
    sys.stderr.write(said)
    if process.exitcode:
        raise _failed(process.exitcode, said)


def _child(task: Task, folder: str, environment: dict[str, str]) -> None:
    """Body of a forked process: what it says goes to a file, and its memory peak counts from now on.

    The process that it is forked off has the environment of the first of them.
    """
    os.environ.clear()
    os.environ.update(environment)
    from .registry import load_peers
    from .throughput import reset_peak

    with Path(folder, SAID).open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    reset_peak()
    load_peers()
    measure_here(task, Path(folder))


def _failed(status: int, said: str) -> RuntimeError:
    """The error of a process that ended with a status, and the last line that it wrote."""
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    return RuntimeError(f"its process ended with status {status}{': ' if last else ''}{last[:300]}")


def _read(folder: Path, case: Case, load: float) -> Measurement | str | None:
    """What a child left of a case; None if it did not come to its end."""
    record = folder / f"{case.stem}.json"
    if not record.exists():
        return None
    found = json.loads(record.read_text())
    if "refusal" in found:
        return str(found["refusal"])
    cpu_seconds, peak_bytes, promised = (found.pop(name) for name in ("cpu_seconds", "peak_bytes", "promised"))
    return Measurement(Result(np.load(folder / f"{case.stem}.npy"), **found), cpu_seconds, peak_bytes, load, promised)


def floors_apart(task: Task) -> dict[Case, Floors]:
    """Measure the floors in a fresh process.

    Args:
        task: its contender is :data:`FLOORS`.

    Returns:
        By case the floors.

    Raises:
        RuntimeError: if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        _measure(task, folder)
        return {case: Floors(**json.loads((Path(folder) / f"{case.stem}.json").read_text())) for case in task.cases}


def start_child(module: str, arguments: Sequence[str], threads: int, limit_seconds: float | None = None) -> None:
    """Run a module of the benchmark in a fresh process and wait for it.

    Args:
        module: its name.
        arguments: its command line.
        threads: CPU threads of every library in it.
        limit_seconds: after which it is ended.

    Raises:
        RuntimeError: if it ends with another status than 0, with the last line that it wrote to stderr.
        subprocess.TimeoutExpired: if it takes longer; it is ended then with all its children.
    """
    environment = {**os.environ, **dict.fromkeys(THREADS_VARIABLES, str(threads))}
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=said)
        try:
            status = process.wait(limit_seconds)
        finally:
            if process.poll() is None:
                end_tree(process.pid)
                process.wait()
        said.seek(0)
        text = said.read()
    sys.stderr.write(text)
    if status:
        raise _failed(status, text)


def end_tree(pid: int) -> None:
    """End a process, if it is still there, with all that it started.

    Args:
        pid: of a child of this process, or of one of its children.
    """
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for child in process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()


def calibrate_once() -> None:
    """Calibrate the machine, for this number of threads, if it never was."""
    if not cached_rates(DEVICE).measured:
        print("calibrating once, which is not counted", flush=True)
        ooc_ntk.calibrate(DEVICE, tempfile.gettempdir())
