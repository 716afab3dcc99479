"""A process that has imported everything once and forks a child per run: starting Python and torch takes seconds."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

#: Seconds after which a child that does not end is a failure.
PATIENCE: Final = 120.0

#: ``prctl`` option: the signal a process gets when its parent dies.
PR_SET_PDEATHSIG: Final = 1

_ROOT: Final = Path(__file__).resolve().parents[2]


class ForkServer:
    """Starts children and says how they ended. Use as a context manager."""

    def __init__(self) -> None:
        """Start the process, single-threaded, warnings as errors."""
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._ended: dict[int, int] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def _ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def start(self, call: str, log: Path, arguments: Mapping[str, Any]) -> int:
        """Fork a child.

        Args:
            call: name of a function of ``child.py``.
            log: what the child prints is appended here.
            arguments: of the function.

        Returns:
            Its process id, which stays its own until :meth:`poll` or :meth:`wait` has told its end.
        """
        pid = int(self._ask(call=call, log=str(log), arguments=dict(arguments)))
        self._ended.pop(pid, None)
        return pid

    def poll(self, pid: int) -> int | None:
        """Exit code of a child, negative for a signal; None while it runs."""
        if pid not in self._ended:
            answer = self._ask(poll=pid)
            if answer is None:
                return None
            self._ended[pid] = int(answer)
        return self._ended[pid]

    def wait(self, pid: int) -> int:
        """Wait for a child's end.

        Returns:
            Its exit code, negative for a signal.

        Raises:
            TimeoutError: if it does not end; it is killed then.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            status = self.poll(pid)
            if status is not None:
                return status
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        raise TimeoutError(f"the child {pid} did not end in {PATIENCE} s")


def _serve() -> None:
    """Fork and reap until the other side closes its end."""
    from . import child  # torch and the package: what every child would import

    _warm_up()
    assert len(os.listdir("/proc/self/task")) == 1, "only a process of one thread can be forked safely"
    with os.fdopen(os.dup(0), "r") as questions, os.fdopen(os.dup(1), "w") as answers:
        for line in questions:
            question = json.loads(line)
            if "poll" in question:
                pid, status = os.waitpid(question["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                answer = os.fork()
                if not answer:
                    _become(child.CALLS[question["call"]], question["log"], question["arguments"])
            print(json.dumps(answer), file=answers, flush=True)


def _warm_up() -> None:
    """Import what a run imports late, as a child that plans and runs a job finds out."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        if not (pid := os.fork()):
            _become(_imported, str(data / "log"), {"data": data})
        os.waitpid(pid, 0)
        for name in (data / "modules").read_text().split():
            with suppress(Exception):
                importlib.import_module(name)


def _imported(data: Path) -> int:
    """Plan and run a job, and write down the names of all modules."""
    from . import child, subjects

    subjects.write_samples(data)
    plan, out, nothing = (str(data / name) for name in ("plan.json", "run", "nothing"))
    child.plan("spill", str(data), plan)
    child.run("spill", str(data), plan, out, "threads", None, nothing, nothing)
    (data / "modules").write_text("\n".join(sys.modules))
    return 0


def _become(call: Any, log: str, arguments: dict[str, Any]) -> None:
    """Be a child: never returns."""
    code = 70
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        code = call(**arguments)
    except BaseException:  # noqa: BLE001 - whatever the engine lets through is what the tests look for
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
