"""The body of every task, whichever executor calls it: do the work, publish its files, return a receipt."""

from __future__ import annotations

import time

from ooc_ntk.compute.machine import peak_device_bytes, return_free_memory
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.manifest import Receipt

from .context import Outcome, RunContext
from .contraction import contract_tile
from .rows import derive_rows


def perform(context: RunContext, task: Task, *upstream: Receipt) -> Receipt:
    """Run one task and return its receipt. Called by every executor.

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
        StorageError: if files cannot be read or written.
    """
    start = time.perf_counter()
    context.phases.clear()
    context.check_stop()
    context.enter(task.kind)
    if task.kind == "release":
        context.store.release(task.generation)
        return_free_memory()
        outcome = Outcome()
    elif task.kind == "rows":
        known = {receipt.key: receipt.samples_digest for receipt in upstream}
        earlier = known.get(Task("rows", task.generation - 1, task.row).key)
        outcome = derive_rows(context, task, earlier or context.digests.get(task.row))
    else:
        outcome = contract_tile(context, task)
    return publish(context, task, outcome, start)


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
        receipt = Receipt(
            key=task.key,
            seconds=time.perf_counter() - start,
            bytes_read=outcome.bytes_read,
            bytes_written=sum(record.size for record in records),
            peak_host_bytes=context.meter.peak_bytes(),
            peak_device_bytes=peak_device_bytes(context.plan.device),
            files=tuple(records),
            samples_digest=outcome.digest,
            replaces=outcome.replaces,
            phases=dict(context.phases),
        )
        if records:
            context.directory.leave_receipt(receipt)
        for file in outcome.files:
            file.publish()
    except BaseException:
        for file in outcome.files:
            file.discard()
        raise
    return receipt
