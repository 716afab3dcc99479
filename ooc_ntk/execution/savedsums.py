"""Sums of a superblock saved while it is contracted, so that stopping loses minutes of it and not hours.

They are no tiles and nothing is committed: a file is taken if its checksum is right and it is of this plan and task,
and otherwise the superblock begins anew. Sums are saved as they are, so that the kernel has the same bits either way.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import IO, Final

import google_crc32c
import numpy as np
import torch

from ooc_ntk.errors import StorageError
from ooc_ntk.storage.atomic import StagedFile
from ooc_ntk.storage.local import free_disk_bytes

from .context import RunContext

logger = logging.getLogger(__name__)

#: Sums are saved so many seconds, and such a share of the promised run, after they were saved last (choices: writing
#: them takes seconds, and at most a hundred times as much as they take is written in a run).
SAVED_SECONDS: Final = 60.0
SAVED_SHARE: Final = 0.01

#: Bytes at the end of the file that say what it holds.
_FOOTER_BYTES: Final = 4096

#: Bytes that are read or copied at a time.
_PIECE_BYTES: Final = 2**22

_PREFIX: Final = "sums-"


#: Writes bytes at a place of a file, by the call that it is given.
Write = Callable[[Callable[[int, memoryview, int], int], memoryview, int], None]


class SavedSums:
    """The file of one task's sums."""

    def __init__(self, context: RunContext, key: str) -> None:
        """Name it; nothing is touched."""
        self._root, self._plan, self._key = context.directory.scratch, context.plan.digest, key
        self._name = f"{_PREFIX}{key}"

    def delete_others(self) -> None:
        """Delete the sums of tasks that are finished: only one superblock is contracted at a time."""
        for path in self._root.glob(f"{_PREFIX}*"):
            if path.name != self._name:
                path.unlink(missing_ok=True)

    def write(self, sums: Sequence[torch.Tensor], span: int, folded: bool, beside: IO[bytes] | None) -> None:
        """Save sums in place of those before; where the disk has no room for them, nothing is saved.

        Args:
            sums: of every tile, (entries,) each.
            span: the span to go on with.
            folded: whether there are float64 sums beside these.
            beside: their file.
        """
        (self._root / self._name).unlink(missing_ok=True)  # there is room for one
        size = sum(each.numel() * each.element_size() for each in sums)
        size += os.fstat(beside.fileno()).st_size if folded and beside is not None else 0
        if size + _FOOTER_BYTES > free_disk_bytes(self._root):
            return
        staged = None
        try:
            staged = StagedFile(self._root, self._name)
            for each in sums:
                staged.append(each.cpu().numpy())
            if folded and beside is not None:
                done, buffer = 0, np.empty(_PIECE_BYTES, dtype=np.uint8)
                while count := os.preadv(beside.fileno(), [buffer.data], done):
                    staged.append(buffer[:count])
                    done += count
            said = {"plan": self._plan, "task": self._key, "span": span, "folded": folded, "crc32c": staged.crc32c}
            staged.append(np.frombuffer(json.dumps(said).encode().ljust(_FOOTER_BYTES), dtype=np.uint8))
            staged.seal()
            staged.publish()
        except (OSError, StorageError) as error:
            logger.warning("the sums of %s so far could not be saved (%s); going on without", self._key, error)
            if staged is not None:
                staged.discard()

    def load(self, sums: Sequence[torch.Tensor], write: Write) -> tuple[int, bool] | None:
        """Read sums back.

        Args:
            sums: memory for the sum of every tile; overwritten, also where None is returned.
            write: writes bytes at a place of the file of float64 sums.

        Returns:
            The span to go on with, and whether there are float64 sums; None if there are none, or not whole ones.
        """
        path = self._root / self._name
        try:
            with path.open("rb", buffering=0) as file:
                end = path.stat().st_size - _FOOTER_BYTES
                said = json.loads(os.pread(file.fileno(), _FOOTER_BYTES, max(0, end)))
                if (said["plan"], said["task"]) != (self._plan, self._key):
                    return None
                crc, place = 0, 0
                for each in sums:
                    values = each.cpu().numpy()
                    raw = values.view(np.uint8)
                    done = 0
                    while done < raw.nbytes:
                        count = os.preadv(file.fileno(), [raw[done : done + _PIECE_BYTES].data], place + done)
                        if not count:
                            return None
                        crc = google_crc32c.extend(crc, raw[done : done + count])
                        done += count
                    each.copy_(torch.from_numpy(values))
                    place += raw.nbytes
                first, buffer = place, np.empty(_PIECE_BYTES, dtype=np.uint8)
                while place < end:
                    count = os.preadv(file.fileno(), [buffer[: end - place].data], place)
                    if not count:
                        return None
                    crc = google_crc32c.extend(crc, buffer[:count])
                    write(os.pwrite, buffer[:count].data, place - first)
                    place += count
                if crc != said["crc32c"]:
                    logger.warning("%s is damaged; the superblock begins anew", path)
                    return None
                return int(said["span"]), bool(said["folded"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("cannot read %s (%s); the superblock begins anew", path, error)
            return None
