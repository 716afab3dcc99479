"""SIGTERM in every phase of a command: exit code 143 within ten seconds, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import ooc_ntk
from ooc_ntk.cli import EXIT_TERMINATED
from ooc_ntk.errors import RunInterrupted
from ooc_ntk.stopping import Terminated, deadline_after_sigterm, stoppable

#: Seconds within which a command must end.
PROMISED = 10.0

#: Seconds after which a child that does not get on fails the test.
PATIENCE = 120.0

#: A model that dawdles where a file asks it to: while it is made, or in tasks (batches of more than two samples).
NETS = """
import hashlib
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def dawdle(phase):
    how = HERE / phase
    if not how.exists():
        return
    (HERE / "dawdling").touch()
    if how.read_text() == "product":  # one call that holds the main thread, as a long matrix product does
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
    time.sleep(float(how.read_text()))


class Net(torch.nn.Sequential):
    def forward(self, x):
        if len(x) > 2:
            dawdle("forward")
        return super().forward(x)


def net():
    dawdle("making")
    torch.manual_seed(0)
    return Net(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).eval()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    job = ["--model", f"{folder / 'nets.py'}:net", "--train", "digits[0:48]", "--device", "cpu"]
    return [sys.executable, "-m", "ooc_ntk", "run", *job, *more]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("wb") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file)


def terminated(child: subprocess.Popen, folder: Path) -> float:
    """Wait until the child dawdles, terminate it, and return how long it took to end."""
    try:
        deadline = time.monotonic() + PATIENCE
        while not (folder / "dawdling").exists():
            assert child.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.02)
        time.sleep(0.3)
        child.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        child.wait(PATIENCE)
        return time.monotonic() - sent
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "how", "says"),
    [
        pytest.param("making", "60", "stopped by SIGTERM", marks=pytest.mark.grid),
        ("forward", "60", "in the middle of a task, which is done again; finished tiles are kept"),
        pytest.param("forward", "product", "in the middle of a task", marks=pytest.mark.grid),
        ("forward", "0.4", "stopped; finished tiles are kept"),
    ],
    ids=["making-the-model", "a-long-forward", "a-long-product", "between-batches"],
)
def test_sigterm_ends_a_command_in_time_with_its_own_code_and_it_goes_on(folder, phase, how, says):
    plan, out = folder / "plan.json", folder / "run"
    job = ooc_ntk.Job(model=f"{folder / 'nets.py'}:net", train="digits[0:48]", device="cpu")
    preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=16)
    made = ooc_ntk.plan(job, ooc_ntk.Budget("16GiB", disk="1GiB"), preferences=preferences, out=folder)
    made.save(plan)
    reference = ooc_ntk.run(job, folder / "reference", plan=made, progress=False)
    arguments = command(folder, "--out", str(out), "--plan", str(plan), "-q")

    (folder / phase).write_text(how)
    child = start(arguments, folder / "log")
    took = terminated(child, folder)
    said = (folder / "log").read_text()
    assert child.returncode == EXIT_TERMINATED == 143, said
    assert took < PROMISED
    assert says in said
    assert "Traceback" not in said
    if how == "0.4":
        assert list(out.rglob("*.tmp-*")) == []

    (folder / phase).unlink()
    assert subprocess.run(arguments, check=False, timeout=PATIENCE).returncode == 0
    assert np.asarray(ooc_ntk.open(out)).tobytes() == np.asarray(reference).tobytes()
    assert list(out.rglob("*.tmp-*")) == []


# --- the parts, without a command ------------------------------------------------------------------------------------


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_while_tasks_run_the_first_signal_is_only_a_wish_and_the_second_acts_as_usual():
    before, caught = handlers(), []
    previous = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try:
        with stoppable() as stop:
            assert not stop.event.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.event.wait(5)
            assert stop.signal == signal.SIGTERM
            assert caught == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [1]
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert handlers() == before


def test_a_second_ctrl_c_stops_at_once():
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("not stopped")

    with pytest.raises(RunInterrupted, match=r"finished tiles are kept") as found, stoppable():
        twice()
    assert found.value.signal == signal.SIGINT


def test_outside_of_tasks_a_command_stops_at_once_and_everything_is_set_back():
    def once(number):
        os.kill(os.getpid(), number)
        time.sleep(5)
        pytest.fail("not stopped")

    before = handlers()
    for number, kind in ((signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(kind), deadline_after_sigterm():
            once(number)
        assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1
    assert [thread.name for thread in threading.enumerate() if "sigterm" in thread.name] == []


def test_within_a_command_a_run_takes_the_signals_of_the_command():
    with deadline_after_sigterm():
        mine = handlers()
        with stoppable() as stop:
            assert handlers() == mine
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.event.wait(5)
        with stoppable() as next_one:
            assert next_one.event.is_set(), "the next run of the same command must not begin"


def test_other_threads_take_no_signals():
    before, seen = handlers(), []

    def work():
        with stoppable() as stop, deadline_after_sigterm():
            seen.append((handlers(), stop.event.is_set()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_forked_children_do_not_tell_their_parent():
    """A loader's process that is terminated must not look as if the command were."""
    code = (
        "import os, signal, sys, time\n"
        "from ooc_ntk import stopping\n"
        "stopping.GRACE_SECONDS = 0.2\n"
        "with stopping.deadline_after_sigterm(), stopping.stoppable() as stop:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        time.sleep(60)\n"
        "        os._exit(1)\n"
        "    time.sleep(0.3)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    _, status = os.waitpid(child, 0)\n"
        "    assert os.WTERMSIG(status) == signal.SIGTERM, status\n"
        "    time.sleep(0.5)\n"
        "    assert not stop.event.is_set()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=False, timeout=PATIENCE, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
