"""What every test shares: a cache of its own, a seed, and a way to plan and run a case."""

import dataclasses
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ooc_ntk
from ooc_ntk.cli import app
from ooc_ntk.compute.rates import rates_path
from ooc_ntk.planning.rates import MachineRates
from tests import s3 as s3_server
from tests.rates import RATES


@pytest.fixture(scope="session")
def rates() -> MachineRates:
    """Plausible rates that count as measured, so that no test calibrates unless it means to."""
    return RATES


if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as processors: more threads would wait for each other
    torch.set_num_threads(1)
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, rates: MachineRates) -> Iterator[Path]:
    """Keep the user's cache out of it; subprocesses inherit the variable."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OOC_NTK_CACHE", str(folder))
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            rates_path(device).write_text(rates.to_json())
        yield folder


@pytest.fixture(scope="module")
def one_thread(_own_cache: Path, rates: MachineRates) -> Iterator[None]:
    """One thread: on a machine that others use too, BLAS threads that wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates_path("cpu").write_text(rates.to_json())
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: a run syncs hundreds of times, and here no power is lost."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None, prefix="ooc-ntk-") as made:
        yield Path(made)


@pytest.fixture
def memory_path(memory_folder: Path) -> Path:
    """A folder of the test's own in memory."""
    return Path(tempfile.mkdtemp(dir=memory_folder))


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., object]:
    """``cli(*arguments)``: run a command in a folder that holds the module's ``NETS`` as ``nets.py``."""
    (tmp_path / "nets.py").write_text(request.module.NETS)
    monkeypatch.chdir(tmp_path)
    # That of another test, which imported it, and the folder that "." was then.
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.delitem(sys.path_importer_cache, ".", raising=False)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[s3_server.Server]:
    with s3_server.serving() as server:
        yield server


@pytest.fixture
def s3(_s3_server: s3_server.Server, monkeypatch: pytest.MonkeyPatch) -> s3_server.Server:
    """A local S3 server, which the environment names."""
    s3_server.set_environment(monkeypatch, s3_server.environment(_s3_server.endpoint))
    return _s3_server


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def frozen() -> None:
    """Spare the collector what was imported: a run collects several times, which would take most of a test's time.

    What was frozen before and is garbage by now goes first: otherwise the process would grow with every module.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture
def compute(tmp_path: Path, rates: MachineRates, frozen: None) -> Callable[..., ooc_ntk.Kernel]:
    """``compute(job, method=None, batch_size=None, scheduler=None, **preferences)``: plan, run, and return the kernel.

    The budget is fixed, so that no test depends on what is free; ``method`` overrides what the probe found faster, and
    leaves layer rules out.
    """
    count = 0

    def plan_and_run(
        job: ooc_ntk.Job,
        method: str | None = None,
        batch_size: int | None = None,
        scheduler: str | None = None,
        **preferences: object,
    ) -> ooc_ntk.Kernel:
        nonlocal count
        count += 1
        if method is not None:
            preferences["layer_rules"] = False
        plan = ooc_ntk.plan(
            job,
            ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB"),
            preferences=ooc_ntk.Preferences(**preferences),
            rates=rates,
        )
        if method is not None:
            plan = dataclasses.replace(plan, method=method)
        if batch_size is not None:
            plan = dataclasses.replace(plan, batch_size=batch_size)
        return ooc_ntk.run(job, tmp_path / f"run-{count}", plan=plan, scheduler=scheduler, progress=False)

    return plan_and_run
