"""Copies beside products: the same bits under every schedule that the events allow, and not without any one of them."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import ooc_ntk
from ooc_ntk.compute import split
from ooc_ntk.compute.streams import CudaQueues, DeviceFeed, Immediate, queues_of
from ooc_ntk.execution import context as context_module
from ooc_ntk.execution import contraction, panels, sums
from ooc_ntk.execution.savedsums import SavedSums
from ooc_ntk.planning import planner
from ooc_ntk.planning.superblocks import AHEAD
from tests import oracle
from tests.cases import case
from tests.execution.simulated import ORDERS, Simulated
from tests.zoo import zoo_case

pytestmark = pytest.mark.usefixtures("one_thread")

#: Jobs whose panels differ in kind, and how they are planned.
JOBS = {
    "spilled, tile by tile": (
        lambda: case("attention").job(),
        {"dataflow": "spill", "representation": "dense", "span_columns": 500, "superblock_tiles": 1},
    ),
    "superblocks": (lambda: case("cnn").job(), {"dataflow": "spill", "superblock_tiles": 4}),
    "dense spans": (
        lambda: case("attention").job(kernel="full"),
        {"dataflow": "spill", "representation": "dense", "span_columns": 500},
    ),
    "resident": (lambda: case("cnn").job(), {"dataflow": "resident", "representation": "factored"}),
    "recomputed": (lambda: case("relu-mlp").job(), {"dataflow": "recompute", "passes": 2, "span_columns": 300}),
    "tokens": (lambda: zoo_case("gpt").job(), {"dataflow": "spill"}),
    "bf16": (lambda: case("cnn").job(precision="bf16"), {"dataflow": "spill"}),
    "bf16x3": (lambda: case("cnn").job(precision="bf16x3"), {"dataflow": "spill", "representation": "dense"}),
    "by layer": (lambda: case("cnn").job(by="layer"), {"dataflow": "spill"}),
    "projected": (lambda: case("cnn").job(projection="sjlt:64"), {}),
}

#: As late as can be with every preference, and at random.
SCHEDULES = [*({"order": order} for order in ORDERS), *({"seed": seed} for seed in range(2))]

#: Jobs that go through every schedule; the others through two.
OFTEN = ("spilled, tile by tile", "superblocks", "resident")


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    """Panels stay in memory where there is room, and here is a lot: nothing would be overwritten."""
    monkeypatch.setattr(planner, "keeping", lambda workload, limits, layout: layout)


@pytest.fixture
def simulate(monkeypatch):
    """``simulate(**schedule)``: runs from now on are on such a device; returns its queues, once there are any."""

    def begin(**schedule):
        made = []

        def queues(device):
            made.append(Simulated(**schedule))
            return made[-1]

        monkeypatch.setattr(context_module, "queues_of", queues)
        return made

    return begin


def entries(name, compute, **changes):
    make, preferences = JOBS[name]
    return np.asarray(compute(make(), tile_samples=6, **preferences, **changes))


@pytest.fixture(scope="module")
def plain():
    """Kernels on the CPU, by job."""
    return {}


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *itertools.product(OFTEN, SCHEDULES),
        *itertools.product([name for name in JOBS if name not in OFTEN], [SCHEDULES[0], SCHEDULES[-1]]),
    ],
    ids=str,
)
def test_every_schedule_gives_the_same_bits(name, schedule, compute, simulate, plain):
    if name not in plain:
        plain[name] = entries(name, compute)
    made = simulate(**schedule)
    assert np.array_equal(entries(name, compute), plain[name])
    log = [entry for queues in made for entry in queues.log]
    assert {("copy", "in", "reader"), ("launch", "compute", "main")} <= set(log), "panels went through the queues"


def test_panels_that_stay_on_the_device(compute, simulate, plain, tmp_path, rates):
    make, preferences = JOBS["superblocks"]
    plan = ooc_ntk.plan(
        make(),
        ooc_ntk.Budget("16GiB", disk="1GiB"),
        preferences=ooc_ntk.Preferences(tile_samples=6, **{**preferences, "superblock_tiles": 1}),
        rates=rates,
    )
    found = {}
    for kept in (0, 2**20, 2**30):
        made = simulate(order=ORDERS[0])
        changed = replace(plan, kept_bytes=kept)
        kernel = ooc_ntk.run(make(), tmp_path / str(kept), plan=changed, progress=False)
        copies = sum(entry[:2] == ("copy", "in") for queues in made for entry in queues.log)
        found[kept] = copies, np.asarray(kernel)
    assert found[2**30][0] < found[0][0], "panels that stay are copied once"
    for _, values in found.values():
        assert np.array_equal(values, found[0][1])


#: What is removed, and an order under which it is missed.
EVENTS = {
    "products wait for the copy": (("wait", "compute"), ("compute", "in", "out")),
    "a slot is overwritten once its products are done": (("wait", "in"), ("in", "compute", "out")),
    "page-locked memory is filled again once it was copied": (("synchronize", "reader"), ("compute", "in", "out")),
    "results are read once they are there": (("synchronize", "main"), ("in", "compute", "out")),
}


@pytest.mark.parametrize("event", EVENTS)
def test_without_any_one_event_the_kernel_is_wrong(event, compute, simulate, plain):
    name = "spilled, tile by tile"
    if name not in plain:
        plain[name] = entries(name, compute)
    ignoring, order = EVENTS[event]
    simulate(order=order, ignoring=ignoring)
    try:
        found = entries(name, compute)
    except ooc_ntk.errors.NonFiniteError:  # memory that was read too early holds no numbers
        return
    assert not np.array_equal(found, plain[name])


def test_a_slot_that_is_never_released_is_overwritten_too_early(compute, simulate, plain, monkeypatch):
    name = "spilled, tile by tile"
    if name not in plain:
        plain[name] = entries(name, compute)
    monkeypatch.setattr(DeviceFeed, "release", lambda self, slot: None)
    simulate(order=("in", "compute", "out"))
    assert not np.array_equal(entries(name, compute), plain[name])


@pytest.mark.parametrize("schedule", [*SCHEDULES[:3], SCHEDULES[-1]], ids=str)
@pytest.mark.parametrize(("name", "dataflow"), [("cnn", "spill"), ("attention", "resident")])
def test_factors_come_back_beside_the_next_batch(name, dataflow, schedule, compute, simulate, plain):
    """Batches of 4 of 11 samples, the last one smaller; test samples with their norms, and dense parameters."""
    settings = {"dataflow": dataflow, "tile_samples": 11, "batch_size": 4, "representation": "factored"}
    key = f"rows of {name}, {dataflow}"
    if key not in plain:
        found = compute(case(name).job(), **settings)
        plain[key] = np.asarray(found), found.diagonal()
    made = simulate(**schedule)
    found = compute(case(name).job(), **settings)
    assert np.array_equal(np.asarray(found), plain[key][0])
    assert np.array_equal(found.diagonal(), plain[key][1])
    assert any(entry[:2] == ("copy", "out") for queues in made for entry in queues.log)


@pytest.mark.parametrize(
    ("ignoring", "order"),
    [(("wait", "out"), ("out", "compute", "in")), (("synchronize", "main"), ("compute", "in", "out"))],
    ids=["factors are copied once they are there", "the host reads them once they are copied"],
)
def test_without_any_one_event_factors_are_wrong(ignoring, order, compute, simulate):
    job = case("smooth-mlp").job()
    settings = {"dataflow": "resident", "tile_samples": 11, "batch_size": 4}
    wanted = np.asarray(compute(job, **settings))
    simulate(order=order, ignoring=ignoring)
    with contextlib.suppress(ooc_ntk.errors.NonFiniteError):  # memory that is read too early holds no numbers
        assert not np.array_equal(np.asarray(compute(job, **settings)), wanted)


def test_the_next_batch_is_captured_before_the_host_waits_for_the_last(compute, simulate):
    made = simulate(order=ORDERS[0])
    compute(case("smooth-mlp").job(), dataflow="resident", tile_samples=40, batch_size=4)
    log = [entry[:2] for entry in made[0].log if entry[0] in ("launch", "synchronize")]
    batches = 9  # 26 train and 7 test samples
    assert log[: 2 * batches] == [
        ("launch", "compute"),
        *[("launch", "compute"), ("synchronize", "")] * (batches - 1),
        ("synchronize", ""),
    ]


def test_factors_that_are_not_finite_name_their_sample_a_batch_later(compute, simulate):
    job = case("attention").job()
    images = job.train[0] if isinstance(job.train, tuple) else job.train
    broken = images.clone()
    broken[6] *= 3e38
    simulate(order=ORDERS[0])
    with pytest.raises(ooc_ntk.errors.NonFiniteError, match="train sample 6"):
        compute(replace(job, train=broken, test=None), dataflow="resident", tile_samples=12, batch_size=4)


@pytest.mark.parametrize("name", ["spilled, tile by tile", "superblocks", "resident"])
def test_the_host_waits_only_at_the_end_of_a_tile(name, compute, simulate):
    """From the first product of a superblock to its last the thread that multiplies asks for nothing back."""
    made = simulate(order=ORDERS[0])
    make, preferences = JOBS[name]
    plan = compute(make(), tile_samples=6, **preferences).plan
    spans = len(plan.layout.spans(plan))
    assert spans > 1
    log = [entry for queues in made for entry in queues.log if entry[2] == "main"]
    log = log[next(i for i, entry in enumerate(log) if entry[:2] == ("wait", "compute")) :]  # after the rows
    launches, counts = 0, []
    for operation, _, _ in log:
        if operation == "launch":
            launches += 1
        elif operation == "synchronize" and launches:
            counts.append(launches)
            launches = 0
    assert not launches
    assert sorted(counts) == sorted(len(block.tiles) * spans for block in plan.superblocks)


def test_sums_are_saved_once_they_are_there(compute, simulate, monkeypatch, tmp_path, rates):
    """For a run that goes on after it was stopped in the middle of a superblock."""
    make, preferences = JOBS["dense spans"]
    wanted = ooc_ntk.Preferences(tile_samples=6, superblock_tiles=4, **preferences)
    plan = ooc_ntk.plan(make(), ooc_ntk.Budget("16GiB", disk="1GiB"), preferences=wanted, rates=rates)
    plan = replace(plan, saves_sums=True)
    monkeypatch.setattr(sums, "SAVED_SECONDS", 0)
    monkeypatch.setattr(sums, "SAVED_SHARE", 0)
    saved = {}

    def write(self, values, span, folded, beside):
        saved[device].append([each.clone() for each in values])

    monkeypatch.setattr(SavedSums, "write", write)
    for device in ("plain", "simulated"):
        if device == "simulated":
            simulate(order=ORDERS[0])
        saved[device] = []
        ooc_ntk.run(make(), tmp_path / device, plan=plan, progress=False, proof=False)
    assert len(saved["plain"]) > 4
    for ours, theirs in zip(saved["plain"], saved["simulated"], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_reading_goes_on_while_products_are_queued(compute, simulate):
    """The next panels are on their way before the products of the present ones have run."""
    made = simulate(order=ORDERS[1])
    entries("spilled, tile by tile", compute)
    log = [entry for queues in made for entry in queues.log]
    first = next(i for i, entry in enumerate(log) if entry[0] == "synchronize" and entry[2] == "main")
    assert sum(entry[:2] == ("copy", "in") for entry in log[:first]) >= 4


def test_new_memory_is_filled_once_the_allocator_can_have_it_back():
    """What the allocator hands out may still be read by products that were queued before."""
    for order in ORDERS:
        queues, seen = Simulated(order=order), []
        memory = torch.zeros(8, dtype=torch.uint8)
        queues.launch(lambda memory=memory, seen=seen: seen.append(memory.clone()))
        queues.device_bytes = lambda size, memory=memory: memory
        feed = DeviceFeed(queues, 8)
        slot = feed.own(8)
        feed.fill(slot, 8, lambda room: room.fill_(7))
        feed.take(slot)
        queues.launch(lambda memory=memory, seen=seen: seen.append(memory.clone()))
        feed.drain()
        assert [values.tolist() for values in seen] == [[0] * 8, [7] * 8]


def test_a_device_without_room_for_all_panels_goes_on_with_fewer(compute, simulate, plain, monkeypatch, caplog):
    """The first attempt fails in the middle of a tile; the same bits, with no panel copied ahead of those in use."""
    name = "superblocks"
    if name not in plain:
        plain[name] = entries(name, compute)
    original, slots, calls = contraction._contract, [], []

    def contract(*given):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(*given)

    plain_slots = DeviceFeed.slots
    monkeypatch.setattr(contraction, "_contract", contract)
    monkeypatch.setattr(DeviceFeed, "slots", lambda self, count: slots.append(count) or plain_slots(self, count))
    simulate(order=ORDERS[0])
    kernel = compute(JOBS[name][0](), tile_samples=6, **JOBS[name][1])
    assert np.array_equal(np.asarray(kernel), plain[name])
    said = [record for record in caplog.records if "ran out of memory" in record.message]
    assert len(said) == 1
    assert "the same bits" in said[0].message
    first, *rest = kernel.plan.superblocks
    assert slots[:2] == [first.live + AHEAD, first.live]
    assert slots[2:] == [block.live for block in rest], "and all that follow"


def test_a_load_that_fails_leaves_the_ring_whole():
    feed = DeviceFeed(Immediate(), 4, locked=1)
    (slot,) = feed.slots(1)

    def fail(room):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        feed.fill(slot, 4, fail)
    feed.fill(slot, 4, lambda room: room.fill_(3))
    feed.take(slot)
    assert slot.memory.tolist() == [3] * 4
    assert feed.slots(1) == [slot], "slots are used again"


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[1], SCHEDULES[-1]], ids=str)
def test_dense_panels_are_split_once_in_their_own_memory(schedule, compute, simulate, plain, monkeypatch):
    """As on a device that multiplies bf16 into float32, of which the products are widened here."""
    name = "bf16x3"
    if name not in plain:
        plain[name] = entries(name, compute)
    counted = []
    monkeypatch.setattr(split, "product_way", lambda device: "added")
    monkeypatch.setattr(panels, "split_in_place", lambda rows: counted.append(1) or split.split_in_place(rows))
    plain_mm, addmm = torch.mm, torch.addmm

    def mm(a, b, out_dtype=None, *, out=None):
        return plain_mm(a, b, out=out) if out_dtype is None else plain_mm(a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", lambda t, a, b, out_dtype, *, out: addmm(t, a.float(), b.float(), out=out))
    simulate(**schedule)
    kernel = compute(JOBS[name][0](), tile_samples=6, **JOBS[name][1], superblock_tiles=1000)
    assert oracle.error(kernel, plain[name]) <= 3e-7
    grid = kernel.plan.sample_grid
    assert len(counted) == grid.row_tiles * len(kernel.plan.layout.spans(kernel.plan))


def test_a_cpu_has_no_queues():
    assert isinstance(queues_of("cpu"), Immediate)
    queues = Immediate()
    left, right = torch.zeros(3), torch.ones(3)
    queues.copy("in", left, right)
    queues.finish()
    assert left.tolist() == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16x3"])
@pytest.mark.parametrize("name", ["spilled, tile by tile", "superblocks", "dense spans", "resident", "recomputed"])
def test_a_gpu_gives_what_a_cpu_gives(name, precision, compute, monkeypatch):
    """And nothing waits for it within a tile: torch raises where an operation would."""
    original, (make, preferences) = contraction._contract, JOBS[name]

    def contract(*given):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(*given)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    monkeypatch.setattr(contraction, "_contract", contract)
    kernels = []
    for device in ("cpu", "cuda"):
        job = replace(make(), device=device, precision=precision)
        kernels.append(np.asarray(compute(job, tile_samples=6, **preferences)))
    bound = 2e-5 if precision == "bf16x3" else 5e-5
    assert oracle.error(kernels[1], kernels[0]) <= bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_gpus_queues_keep_their_events():
    queues = CudaQueues("cuda")
    feed = DeviceFeed(queues, 2**22)
    slots, seen = feed.slots(2), []
    for number in range(20):
        slot = slots[number % 2]
        feed.fill(slot, 2**22, lambda room, number=number: room.fill_(number))
        feed.take(slot)
        queues.launch(lambda slot=slot: seen.append(slot.memory.float().mean()))
        feed.release(slot)
    feed.drain()
    assert [float(value) for value in seen] == list(range(20))
