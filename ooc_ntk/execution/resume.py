"""What is left of a run: finished tasks are kept, damaged files undone, lost tiles derived again."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from ooc_ntk.errors import StorageError
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.manifest import Manifest, Receipt

from .stores import TileStore

logger = logging.getLogger(__name__)


@dataclass
class Remaining:
    """Tasks still to be run and what was found on the way.

    Attributes:
        tasks: in an order that respects dependencies.
        finished: keys of tasks that are committed and need not run again.
        damaged: damaged files and what is wrong with each.
        adopted: keys of tasks that had finished without being committed.
        again: finished ``rows`` tasks that run once more because their tiles are gone.
    """

    tasks: list[Task]
    finished: set[str]
    damaged: dict[str, str] = field(default_factory=dict)
    adopted: list[str] = field(default_factory=list)
    again: set[str] = field(default_factory=set)

    def waits(self, plan: Plan) -> dict[Task, tuple[Task, ...]]:
        """Direct dependencies of every remaining task among the remaining ones."""
        left = {task: task for task in self.tasks}  # one object each: a run may have a hundred thousand
        return {
            task: tuple(left[earlier] for earlier in plan.graph.dependencies(task) if earlier in left)
            for task in self.tasks
        }


def adopt(directory: RunDirectory, manifest: Manifest) -> list[str]:
    """Commit tasks that had published their files when the run stopped; forget the others.

    A file is adopted only if it has the size and checksum of the receipt, and the receipt is of this plan: a worker
    whose driver was killed may end a task of another job that was run here before.

    Returns:
        Keys of the adopted tasks.

    Raises:
        StorageError: if an object store cannot be reached, or the manifest cannot be written.
    """
    adopted = []
    known, plan = manifest.receipts(), manifest.meta("plan")
    for receipt in directory.pending_receipts():
        if receipt.plan == plan and receipt.key not in known and _is_whole(directory, receipt):
            manifest.commit(receipt)
            directory.log_receipt(receipt)
            directory.delete(*receipt.replaces)
            adopted.append(receipt.key)
        directory.drop_receipt(receipt.key)
    return adopted


def _is_whole(directory: RunDirectory, receipt: Receipt) -> bool:
    files = directory.files
    try:
        return all(
            files.size(record.path) == record.size and files.checksum(record.path) == record.crc32c
            for record in receipt.files
        )
    except StorageError:  # of an object store that cannot be reached: nothing is known of them
        raise
    except OSError:
        return False


def remaining_tasks(
    plan: Plan, directory: RunDirectory, manifest: Manifest, store: TileStore, records: dict[str, FileRecord]
) -> Remaining:
    """Find what is left to do.

    Args:
        plan: the stored plan.
        directory: the run directory, locked.
        manifest: its manifest.
        store: the tile store; tiles in memory are gone in a new process.
        records: committed files by path, brought up to date here.

    Returns:
        The remaining tasks.
    """
    swept = directory.sweep()
    adopted = adopt(directory, manifest)
    damage = manifest.damage(thorough=False)
    for path, reason in damage.reasons.items():
        logger.warning("%s %s; it will be computed again", directory.files.place(path), reason)
    undone = _undo(plan, damage.tasks)
    manifest.withdraw(undone)
    records.clear()
    records.update(manifest.files())
    finished = set(manifest.receipts())
    logger.info(
        "%d tasks finished, %d adopted, %d undone, %d files swept", len(finished), len(adopted), len(undone), swept
    )

    every = list(plan.graph.tasks())
    left = [task for task in every if task.key not in finished]
    again = _lost_rows(plan, left, finished, store)
    kernels = {task.generation for task in left if task.kind != "release"} | {task.generation for task in again}
    wanted = {*left, *again, *(Task("release", generation) for generation in kernels)}
    manifest.withdraw(task.key for task in wanted if task.kind == "release" and task.key in finished)
    return Remaining(
        tasks=[task for task in every if task in wanted],
        finished=finished - {task.key for task in wanted},
        damaged=damage.reasons,
        adopted=adopted,
        again={task.key for task in again},
    )


def _undo(plan: Plan, damaged: Iterable[str]) -> set[str]:
    """Tasks to withdraw: a damaged tile is computed anew from its first generation, as the earlier ones are deleted.

    Rows whose diagonal feeds later generations are withdrawn in all passes, kernel tiles likewise. A damaged diagonal
    of a normalised kernel does not undo kernel tiles: it is recomputed to the same bits.
    """
    undone: set[str] = set()
    for key in damaged:
        kind, _, row, column = key.split("-")
        undone.update(f"{kind}-{generation}-{row}-{column}" for generation in range(len(plan.passes)))
    return undone


def _lost_rows(plan: Plan, left: list[Task], finished: set[str], store: TileStore) -> set[Task]:
    """Finished ``rows`` tasks whose tiles an unfinished kernel task needs and the store does not hold."""
    needed = {
        Task("rows", task.generation, index)
        for task in left
        if task.kind == "kernel"
        for index in plan.graph.superblock(task).panels
    }
    return {task for task in needed if task.key in finished and not store.holds(task.generation, task.row)}
