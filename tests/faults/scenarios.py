"""Scenarios: numbers that stand for a job and one to three faults at random moments, and how to play them."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import ooc_ntk

from . import observation, places
from .injection import Action, Injection, Operation
from .observation import Reference, Snapshot, snapshot
from .server import PATIENCE, ForkServer
from .subjects import SUBJECTS, write_samples

#: Scenarios of the whole.
WHOLE: Final = 200

#: Scenarios that are always tested: every kind of fault and every job is among them.
SUBSET: Final = 28

#: Exit codes of a run that was asked to stop by SIGTERM.
STOPPED: Final = (143,)

#: Exit code of a run that could not read or write.
STORAGE: Final = 2

#: Exit codes after one I/O error that does not come back: a run tries again where that is safe, or stops.
AFTER_ONE_ERROR: Final = (STORAGE, 0)

KILLED: Final = -int(signal.SIGKILL)
TERMINATED: Final = -int(signal.SIGTERM)


@dataclass
class Outcome:
    """What a step did.

    Attributes:
        kind: the kind of fault.
        code: exit code of the run, None if none ran.
        fired: whether the fault struck before the run ended by itself.
        journal: whether it left a transaction to be rolled back.
        note: what else is to be counted.
    """

    kind: str
    code: int | None = None
    fired: bool = True
    journal: bool = False
    note: str = ""


class Laboratory:
    """What scenarios share: the fork server, the samples, plans, and references made once."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        """Write the samples.

        Args:
            server: starts the runs.
            folder: for samples, plans and undisturbed runs.
        """
        self.server, self.folder = server, folder
        self.no_mount = places.no_mount()
        self.read_only_way = places.read_only_way()
        self._references: dict[str, Reference] = {}
        write_samples(folder)

    def plan(self, subject: str) -> Path:
        """The saved plan of a job."""
        return self.folder / f"{subject}.json"

    def reference(self, subject: str) -> Reference:
        """The undisturbed run of a job."""
        if subject not in self._references:
            log, out = self.folder / f"{subject}.log", self.folder / f"reference-{subject}"
            made = {"subject": subject, "data": str(self.folder), "path": str(self.plan(subject))}
            assert self.server.wait(self.server.start("plan", log, made)) == 0, log.read_text()
            run = Run(self, subject, out, log, "serial")
            assert run.wait() == 0, log.read_text()
            self._references[subject] = observation.reference_of(out, run.counts())
            assert ooc_ntk.verify(out, samples=4).passed
        return self._references[subject]


class Run:
    """One child process that runs a job."""

    def __init__(
        self,
        laboratory: Laboratory,
        subject: str,
        out: Path,
        log: Path,
        scheduler: str,
        injection: Injection | None = None,
    ) -> None:
        """Start it."""
        self._server, self._out, self._log = laboratory.server, out, log
        self._fired, self._counts = log.with_suffix(".fired"), log.with_suffix(".counts")
        self._fired.unlink(missing_ok=True)
        self._counts.unlink(missing_ok=True)
        self._said = log.stat().st_size if log.exists() else 0
        self._before = self.tasks_logged()
        self.pid = self._server.start(
            "run",
            log,
            {
                "subject": subject,
                "data": str(laboratory.folder),
                "plan": str(laboratory.plan(subject)),
                "out": str(out),
                "scheduler": scheduler,
                "injection": None if injection is None else injection.to_json(),
                "fired": str(self._fired),
                "counts": str(self._counts),
            },
        )

    def wait(self) -> int:
        """Exit code once it has ended; what it printed is checked."""
        code = self._server.wait(self.pid)
        observation.check_output(self._log.read_bytes()[self._said :].decode(), code)
        return code

    def tasks_logged(self) -> int:
        """Tasks in the log of receipts, which is cheaper to poll than the manifest."""
        log = self._out / "receipts.jsonl"
        return len(re.findall(rb'"key": ', log.read_bytes())) if log.exists() else 0

    def wait_for(self, tasks: int) -> bool:
        """Wait until so many tasks were committed since the start; False if the run ended before."""
        deadline = time.monotonic() + PATIENCE
        while self.tasks_logged() - self._before < tasks:
            if self._server.poll(self.pid) is not None:
                return False
            assert time.monotonic() < deadline, f"no {tasks} tasks in {PATIENCE} s"
            time.sleep(0.0005)
        return True

    def signal(self, number: int) -> None:
        """Send a signal; a run that has ended does not mind."""
        if self._server.poll(self.pid) is None:
            os.kill(self.pid, number)

    @property
    def fired(self) -> bool:
        """Whether the injected fault struck."""
        return self._fired.exists()

    def counts(self) -> dict[str, int]:
        """Calls at the file layer of a run that has ended by itself."""
        found: dict[str, int] = json.loads(self._counts.read_text())
        return found


@dataclass
class Stage:
    """One run directory under fire.

    Attributes:
        laboratory: what scenarios share.
        subject: name of the job.
        disk: the file system of its own, or a folder.
        mounted: whether ``disk`` is a file system of its own.
        log: where the runs print to.
        damaged: files that were damaged and not computed again yet.
        ever_damaged: whether any file was damaged.
        before: the manifest when everything was checked last.
    """

    laboratory: Laboratory
    subject: str
    disk: Path
    mounted: bool
    log: Path
    damaged: set[str] = field(default_factory=set)
    ever_damaged: bool = False
    before: Snapshot = field(default_factory=Snapshot)

    @property
    def out(self) -> Path:
        """The run directory."""
        return self.disk / "run"

    @property
    def reference(self) -> Reference:
        """The undisturbed run."""
        return self.laboratory.reference(self.subject)

    def start(self, chance: random.Random, injection: Injection | None = None) -> Run:
        """Start a run, by either executor."""
        scheduler = chance.choice(("serial", "threads"))
        return Run(self.laboratory, self.subject, self.out, self.log, scheduler, injection)

    def left(self) -> int:
        """Tasks not finished yet."""
        return len(self.reference.tasks) - len(snapshot(self.out).tasks)

    def settle(self, chance: random.Random) -> None:
        """Check everything that must hold when no run is under way.

        Args:
            chance: whether the kernel is opened, which has SQLite roll back what a kill left.
        """
        now = snapshot(self.out)
        observation.check_kept(self.before, now, self.damaged, self.ever_damaged, self.reference.tasks)
        self.damaged = {
            path
            for path in self.damaged
            if path in now.files and not observation.is_whole(self.out, path, now.files[path])
        }
        observation.check_files(self.out, now, self.reference, self.damaged)
        observation.check_unlocked(self.out)
        if chance.random() < 0.5:
            observation.check_opened(self.out, now, self.reference, self.damaged)
        self.before = now

    def spoil(self, path: str, how: str, chance: random.Random) -> None:
        """Damage a committed file."""
        spoil(self.out / path, how, chance)
        self.damaged.add(path)
        self.ever_damaged = True


# --- kinds of faults -------------------------------------------------------------------------------------------------

Kind = Callable[[Stage, random.Random], Outcome]


def by_signal(number: int, codes: tuple[int, ...]) -> Kind:
    """A signal after a random number of tasks and a random pause."""

    def play(stage: Stage, chance: random.Random) -> Outcome:
        run = stage.start(chance)
        reached = run.wait_for(chance.randint(0, max(1, stage.left() - 1)))
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.02))))
        run.signal(number)
        code = run.wait()
        allowed = {0, *codes}
        if number == signal.SIGTERM and (
            not stage.left() or snapshot(stage.out).tasks.keys() == stage.before.tasks.keys()
        ):
            allowed.add(TERMINATED)  # before the work began or after it was done, a signal acts as usual
        assert code in allowed, f"exit code {code}"
        if code in STOPPED:
            observation.check_swept(stage.out)
        return Outcome("", code, fired=reached and code != 0)

    return play


def injected(
    operation: Operation,
    action: Action,
    error: int = 0,
    *,
    lasting: bool = False,
    codes: tuple[int, ...] = (STORAGE, 0),
) -> Kind:
    """A fault at a random call of a kind at the file layer."""

    def play(stage: Stage, chance: random.Random) -> Outcome:
        wanted = stage.reference.counts.get(operation, 0)
        share = stage.left() / len(stage.reference.tasks)
        call = 1 + int(chance.random() * wanted * share)
        delay = chance.choice((0.0, chance.uniform(0, 3e-4)))
        run = stage.start(chance, Injection(operation, action, call, error, lasting, delay))
        code = run.wait()
        assert code in (codes if run.fired else (0,)), f"exit code {code} at call {call}"
        if code == STORAGE and error == errno.ENOSPC:
            observation.check_swept(stage.out)
        return Outcome("", code, run.fired)

    return play


def killed(operation: Operation) -> Kind:
    """SIGKILL right before, during or right after a random call of a kind."""

    def play(stage: Stage, chance: random.Random) -> Outcome:
        action: Action = chance.choice(("kill-before", "kill-during", "kill-after"))
        # A call may end, and with it the run, before the signal is there.
        return injected(operation, action, codes=(KILLED, 0) if action == "kill-during" else (KILLED,))(stage, chance)

    return play


def spoil(path: Path, how: str, chance: random.Random) -> None:
    """Flip a byte of a file, cut it short or delete it; sometimes the time of its last change is set back."""
    if how == "deleted":
        path.unlink()
        return
    stat = path.stat()
    with path.open("r+b") as file:
        if how == "truncated":
            file.truncate(chance.randrange(stat.st_size))
        else:
            place = chance.randrange(stat.st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << chance.randrange(8))]))
    if chance.random() < 0.5:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def pick(seen: Snapshot, chance: random.Random) -> str:
    """A committed file: any kind of array equally often."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(seen.files):
        kinds.setdefault("/".join(path.split("/")[:2]) if path.startswith("tiles") else path.split("/")[0], []).append(
            path
        )
    return chance.choice(kinds[chance.choice(sorted(kinds))])


def damaged_at_rest(how: str) -> Kind:
    """A committed file is damaged while the run is stopped."""

    def play(stage: Stage, chance: random.Random) -> Outcome:
        if not snapshot(stage.out).files:
            step = injected("commit", "kill-after", codes=(KILLED,))
            step(stage, chance)
            stage.settle(chance)
        seen = snapshot(stage.out)
        if not seen.files:
            return Outcome("", fired=False)
        path = pick(seen, chance)
        stage.spoil(path, how, chance)
        return Outcome("", note=path.split("/")[0])

    return play


def damaged_while_running(how: str) -> Kind:
    """A committed file is damaged while the run is held in the middle, and the run goes on."""

    def play(stage: Stage, chance: random.Random) -> Outcome:
        run = stage.start(chance)
        reached = run.wait_for(chance.randint(1, max(1, stage.left() - 1)))
        path = ""
        if reached:
            run.signal(signal.SIGSTOP)
            seen = snapshot(stage.out)
            whole = [path for path, file in seen.files.items() if observation.is_whole(stage.out, path, file)]
            if whole:
                path = pick(Snapshot(files={path: seen.files[path] for path in whole}), chance)
                stage.spoil(path, how, chance)
            run.signal(signal.SIGCONT)
        code = run.wait()
        assert code in (0, STORAGE), f"exit code {code}"
        now = snapshot(stage.out)
        if code == 0 and path in now.files:
            assert observation.is_whole(stage.out, path, now.files[path]), (
                f"the run ended well although {path} is damaged"
            )
        return Outcome("", code, fired=bool(path), note=path.split("/")[0])

    return play


def damaged_when_finished(how: str) -> Kind:
    """The run is finished undisturbed, and one of its results damaged: ``verify`` must see it."""

    def play(stage: Stage, chance: random.Random) -> Outcome:
        assert stage.start(chance).wait() == 0
        stage.settle(chance)
        path = pick(snapshot(stage.out), chance)
        stage.spoil(path, how, chance)
        assert not ooc_ntk.verify(stage.out, samples=0).passed, f"verify does not see that {path} is damaged"
        return Outcome("", note=path.split("/")[0])

    return play


def full_disk(stage: Stage, chance: random.Random) -> Outcome:
    """The disk has a few pages left, from the start of a run or from a moment in its middle."""
    if not stage.mounted:
        outcome = injected(chance.choice(("write", "create", "statement")), "error", errno.ENOSPC, lasting=True)(
            stage, chance
        )
        outcome.note = "injected"
        return outcome
    left = 4096 * chance.choice((0, 0, 1, 2, 5, 12))
    at_rest = chance.random() < 0.3 and (stage.out / "plan.json").exists()
    if at_rest:
        places.fill(stage.disk, left)
    run = stage.start(chance)
    reached = at_rest or run.wait_for(chance.randint(0, max(1, stage.left() - 1)))
    if reached and not at_rest:
        run.signal(signal.SIGSTOP)
        places.fill(stage.disk, left)
        run.signal(signal.SIGCONT)
    code = run.wait()
    assert code in (0, STORAGE), f"exit code {code}"
    if code == STORAGE:
        observation.check_swept(stage.out)
        assert "disk is full" in stage.log.read_text() or "of disk" in stage.log.read_text()
    if reached:
        places.make_room(stage.disk)
    return Outcome("", code, fired=code != 0, note="tmpfs")


def read_only(stage: Stage, chance: random.Random) -> Outcome:
    """The run directory cannot be written: at rest by modes or a remount, in the middle by injected errors."""
    way = stage.laboratory.read_only_way
    if not stage.out.exists() or way == "injected" or (way == "remount" and not stage.mounted) or chance.random() < 0.4:
        operation: Operation = chance.choice(("write", "create", "rename", "statement"))
        outcome = injected(operation, "error", errno.EROFS, lasting=True)(stage, chance)
        outcome.note = "injected"
        return outcome
    seen = snapshot(stage.out)
    with places.read_only(stage.disk, stage.out, way):
        code = stage.start(chance).wait()
        assert code == STORAGE, f"exit code {code}"
        observation.check_opened(stage.out, seen, stage.reference, stage.damaged)
    return Outcome("", code, note=way)


KINDS: Final[dict[str, Kind]] = {
    "SIGKILL": by_signal(signal.SIGKILL, (KILLED,)),
    "SIGKILL at a commit": killed("commit"),
    "flipped byte, stopped": damaged_at_rest("flipped"),
    "SIGTERM": by_signal(signal.SIGTERM, STOPPED),
    "full disk": full_disk,
    "SIGKILL at a rename": killed("rename"),
    "truncated file, stopped": damaged_at_rest("truncated"),
    "EIO once, read": injected("read", "error", errno.EIO, codes=AFTER_ONE_ERROR),
    "deleted file, running": damaged_while_running("deleted"),
    "SIGKILL at a statement": killed("statement"),
    "ENOSPC, write": injected("write", "torn", errno.ENOSPC, lasting=True),
    "read-only directory": read_only,
    "SIGKILL at a write": killed("write"),
    "deleted file, stopped": damaged_at_rest("deleted"),
    "EIO once, write": injected("write", "error", errno.EIO, codes=AFTER_ONE_ERROR),
    "flipped byte, running": damaged_while_running("flipped"),
    "SIGKILL at a sync": killed("sync"),
    "ENOSPC, manifest": injected("statement", "error", errno.ENOSPC, lasting=True),
    "short writes": injected("write", "short", codes=(0,)),
    "flipped byte, finished": damaged_when_finished("flipped"),
    "SIGKILL at a create": killed("create"),
    "EIO for good": injected("sync", "error", errno.EIO, lasting=True, codes=(STORAGE, 0)),
    "truncated file, running": damaged_while_running("truncated"),
    "EIO once, sync": injected("sync", "error", errno.EIO, codes=AFTER_ONE_ERROR),
    "SIGKILL at a deletion": killed("unlink"),
    "ENOSPC once, create": injected("create", "error", errno.ENOSPC),
    "EIO once, rename": injected("rename", "error", errno.EIO, codes=AFTER_ONE_ERROR),
    "SIGKILL at a read": killed("read"),
    "truncated file, finished": damaged_when_finished("truncated"),
    "EIO once, manifest": injected("commit", "error", errno.EIO, codes=AFTER_ONE_ERROR),
    "short reads": injected("read", "short", codes=(0,)),
    "deleted file, finished": damaged_when_finished("deleted"),
}

#: Kinds that need a file system of their own.
ON_SMALL_DISK: Final = ("full disk", "read-only directory")


@dataclass(frozen=True)
class Scenario:
    """A job and faults in sequence.

    Attributes:
        number: the seed of everything in it.
        subject: name of the job.
        kinds: the faults.
    """

    number: int
    subject: str
    kinds: tuple[str, ...]

    def __str__(self) -> str:
        return f"scenario {self.number}: {self.subject}; {', '.join(self.kinds)}"


def scenario(number: int) -> Scenario:
    """The scenario of a number: the first fault goes through all kinds in turn, the rest is drawn."""
    chance = random.Random(f"scenario {number}")
    kinds, subjects = list(KINDS), list(SUBJECTS)
    chosen = [kinds[number % len(kinds)], *chance.choices(kinds, k=chance.choice((0, 0, 1, 1, 2)))]
    chance.shuffle(chosen)
    return Scenario(number, subjects[(number + number // len(kinds)) % len(subjects)], tuple(chosen))


def play(chosen: Scenario, laboratory: Laboratory) -> list[Outcome]:
    """Play a scenario.

    Args:
        chosen: the scenario.
        laboratory: what scenarios share.

    Returns:
        What every step did.

    Raises:
        AssertionError: naming the scenario and the step, if anything did not hold.
    """
    found: list[Outcome] = []
    laboratory.reference(chosen.subject)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=places.memory_folder(), prefix="ooc-ntk-")))
        disk = folder / "disk"
        disk.mkdir()
        mounted = False
        if any(kind in ON_SMALL_DISK for kind in chosen.kinds) and laboratory.no_mount is None:
            stack.enter_context(places.small_disk(disk))
            mounted = True
        stage = Stage(laboratory, chosen.subject, disk, mounted, folder / "log")
        try:
            for index, kind in enumerate(chosen.kinds):
                chance = random.Random(f"scenario {chosen.number}, step {index}")
                outcome = KINDS[kind](stage, chance)
                outcome.kind = kind
                outcome.journal = outcome.code == KILLED and snapshot(stage.out).journal
                found.append(outcome)
                stage.settle(chance)
            _finish(stage, random.Random(f"scenario {chosen.number}, end"))
        except Exception as error:
            said = stage.log.read_text()[-3000:] if stage.log.exists() else ""
            raise AssertionError(f"{chosen}, after {found}: {type(error).__name__}: {error}\n{said}") from error
    return found


def _finish(stage: Stage, chance: random.Random) -> None:
    """Run undisturbed to the end, and once more, which changes nothing."""
    code = stage.start(chance).wait()
    assert code == 0, f"the undisturbed run ended with exit code {code}"
    stage.settle(chance)
    observation.check_finished(stage.out, stage.reference)
    if chance.random() < 0.2:
        before = snapshot(stage.out)
        assert stage.start(chance).wait() == 0
        assert snapshot(stage.out) == before
