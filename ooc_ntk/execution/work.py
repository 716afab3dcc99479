"""The body of every task, whichever executor calls it: do the work, publish its files, return a receipt."""

from __future__ import annotations

import logging
import time

import torch

from ooc_ntk.compute.machine import peak_device_bytes, return_free_memory
from ooc_ntk.errors import BudgetError, InputError, TransientStorageError
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage import retries
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.manifest import Receipt
from ooc_ntk.storage.retries import note_retry

from .context import Outcome, RunContext
from .contraction import contract_superblock
from .rows import derive_rows

logger = logging.getLogger(__name__)


def perform(context: RunContext, task: Task, *upstream: Receipt) -> Receipt:
    """Run one task and return its receipt. Called by every executor.

    What a file system may get over is done again as a whole, a few times. Rows for which the device has no room are
    derived again in smaller batches, and all that follow; kernel tiles are contracted again with fewer panels there.

    Args:
        context: what the tasks of this process share.
        task: the task.
        upstream: receipts of the tasks it depends on, as far as they ran in this session.

    Returns:
        The receipt; files are published but not yet committed.

    Raises:
        RunInterrupted: if the run should stop; nothing of the task is left then.
        NonFiniteError: if inputs, gradients or kernel are not finite.
        DataChangedError: if the samples differ from an earlier reading.
        BudgetError: if there is no memory even for one sample.
        StorageError: if files cannot be read or written.
    """
    start = time.perf_counter()
    delays = iter(enumerate(retries.TASK_DELAYS, start=1))
    while True:
        # Errors are dealt with after their handlers: while they live, so does all that the failed attempt held.
        try:
            return publish(context, task, _work(context, task, upstream), start)
        except TransientStorageError as error:
            number, delay = next(delays, (0, 0.0))
            if not number:
                raise
            note_retry(f"task {task.key}", error, number, delay)
            full = ""
        except (torch.OutOfMemoryError, MemoryError, InputError, RuntimeError) as error:
            full, delay = exhausted(error), 0.0
            if not full:
                raise
            reason = " ".join(str(error).split())[:200]
        if full:
            _make_room(context, task, full, reason)
        elif context.stop.event.wait(delay):
            context.check_stop()


def _work(context: RunContext, task: Task, upstream: tuple[Receipt, ...]) -> Outcome:
    """The work of a task; its files are staged."""
    context.phases.clear()
    context.check_stop()
    context.enter(task.kind)
    if task.kind == "release":
        context.store.release(task.generation)
        return_free_memory()
        return Outcome()
    if task.kind == "rows":
        known = {receipt.key: receipt.samples_digest for receipt in upstream}
        earlier = known.get(Task("rows", task.generation - 1, task.row).key)
        return derive_rows(context, task, earlier or context.digests.get(task.row))
    return contract_superblock(context, task)


def exhausted(error: BaseException) -> str:
    """Which memory an error says is full, ``device`` or ``host``; empty if it is about something else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError):
            return "device"
        if isinstance(cause, MemoryError) or "DefaultCPUAllocator" in str(cause):
            return "host"
        cause = cause.__cause__
    return ""


def _make_room(context: RunContext, task: Task, full: str, reason: str) -> None:
    """Go on with smaller batches after the device had no room for one, or with fewer panels at a time.

    Raises:
        BudgetError: if batches cannot be smaller, or are not what is too large.
    """
    context.drop_buffers()
    device, kept = context.plan.device, "finished tiles are kept"
    flag = "--host-memory" if full == "host" else "--device-memory"
    where = "the host" if full == "host" else device
    if full == "device" and task.kind == "kernel" and not context.frugal:
        context.frugal = True
        logger.warning(
            "%s ran out of memory in task %s; doing it again, and all that follows, with as few panels there as will "
            "do (slower, the same bits)",
            where,
            task.key,
        )
        return
    if full == "host" or task.kind != "rows":
        raise BudgetError(
            f"{where} ran out of memory in task {task.key} ({reason}); {kept}: free memory that others hold there and "
            f"run the same command again, or start anew in another --out with a smaller {flag}"
        )
    if context.batch_size == 1:
        raise BudgetError(
            f"{where} ran out of memory with a single sample in task {task.key} ({reason}); {kept}: free memory that "
            f"others hold there and run the same command again, or start anew in another --out with a smaller {flag}, "
            "fewer --parameters, or --device cpu"
        )
    before, context.batch_size = context.batch_size, context.batch_size // 2
    logger.warning(
        "%s ran out of memory with %d samples at once in task %s; doing it again, and all that follows, with %d (the "
        "last bits of the kernel may differ from those of an undisturbed run)",
        where,
        before,
        task.key,
        context.batch_size,
    )


def publish(context: RunContext, task: Task, outcome: Outcome, start: float) -> Receipt:
    """Sync every file, leave the receipt for a possible adoption, then rename.

    Args:
        context: what the tasks of this process share.
        task: the task.
        outcome: what its body left behind.
        start: when it began, by ``time.perf_counter``.

    Returns:
        The receipt.

    Raises:
        StorageError: if files cannot be written; nothing of the task is left then.
    """
    records: list[FileRecord] = []
    try:
        with context.phase("commit"):
            records = [file.seal() for file in outcome.files]
        tried = retries.retries()
        smaller = task.kind == "rows" and context.batch_size < context.plan.batch_size
        receipt = Receipt(
            key=task.key,
            seconds=time.perf_counter() - start,
            bytes_read=outcome.bytes_read,
            bytes_written=sum(record.size for record in records) + outcome.bytes_aside,
            peak_host_bytes=context.meter.peak_bytes(),
            peak_device_bytes=peak_device_bytes(context.plan.device),
            files=tuple(records),
            samples_digest=outcome.digest,
            replaces=outcome.replaces,
            phases=dict(context.phases),
            retries=tried - context.retries_counted,
            batch_size=context.batch_size if smaller else 0,
            started=time.time() - (time.perf_counter() - start),
            worker=context.worker,
            plan=context.plan_digest,
        )
        if records:
            context.directory.leave_receipt(receipt)
        for file in outcome.files:
            file.publish()
        context.retries_counted = tried
    except BaseException:
        for file in outcome.files:
            file.discard()
        raise
    return receipt
