"""Spilled tiles that are read straight into device memory, where GPUDirect Storage is asked for."""

from __future__ import annotations

from typing import Any

import torch

from ooc_ntk.compute.contract import HELD_TORCH_DTYPE
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.spans import Part
from ooc_ntk.storage import gds
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.local import LocalFiles

from .stores import DiskStore


def on_device(plan: Plan) -> bool:
    """Whether tiles are read into device memory: a CUDA plan, KvikIO, and ``OOC_NTK_GDS=1``."""
    return torch.device(plan.device).type == "cuda" and gds.wanted()


class DeviceStore(DiskStore):
    """Tiles as raw chunk files, loaded as tensors on the plan's device. Never run on a GPU; see :mod:`storage.gds`."""

    def __init__(self, plan: Plan, files: LocalFiles, records: dict[str, FileRecord]) -> None:
        """See :class:`DiskStore`."""
        super().__init__(plan, files, records)
        device = torch.device(plan.device)

        def wait() -> None:
            # A buffer is handed back when its products are queued, not when they are done.
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        self._reader = gds.DeviceReader(files.root, lambda part: part.cpu().numpy(), wait)

    def buffer(self, span: int | None = None) -> Any:
        """See :meth:`TileStore.buffer`; on the device."""
        return torch.empty(self.buffer_bytes(span), dtype=torch.uint8, device=self.plan.device)

    def typed(self, chunk: Any, part: Part) -> Any:
        """See :meth:`DiskStore.typed`; a tensor."""
        return chunk.view(torch.int32 if part.tokens else HELD_TORCH_DTYPE[self.plan.precision])
