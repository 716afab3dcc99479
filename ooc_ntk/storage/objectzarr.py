"""Objects as a Zarr store: errors are those of the engine, tried again as often, and no secret is pickled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import obstore
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore

from .objects import ObjectFiles


class ZarrObjects(ObjectStore[Any]):
    """The objects of a run for Zarr, which reads and writes by them what it would by a plain ``ObjectStore``."""

    def __init__(self, files: ObjectFiles, *, read_only: bool = False) -> None:
        """Take the objects."""
        super().__init__(files.store, read_only=read_only)
        self._files = files

    def with_read_only(self, read_only: bool = False) -> ZarrObjects:
        """The same objects, to be written or not."""
        return ZarrObjects(self._files, read_only=read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrObjects) and (self._files, self.read_only) == (other._files, other.read_only)

    def __hash__(self) -> int:
        return hash((self._files, self.read_only))

    def __str__(self) -> str:
        return self._files.url

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads its own environment."""
        return _made, (self._files, self.read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Bytes of an object; None if it is not there.

        Raises:
            StorageError: if it cannot be read.
        """
        try:
            found = await asyncio.to_thread(self._bytes, key, byte_range)
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(found)

    def _bytes(self, key: str, wanted: ByteRequest | None) -> bytes:
        if isinstance(wanted, RangeByteRequest):
            return self._files.read_bytes(key, wanted.start, wanted.end)
        if isinstance(wanted, OffsetByteRequest):
            return self._files.read_bytes(key, wanted.offset)
        if wanted is not None:
            return self._files.read_bytes(key, max(0, self._files.size(key) - wanted.suffix))
        return self._files.read_bytes(key)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Bytes of several objects, as :meth:`get`."""
        return [await self.get(key, prototype, wanted) for key, wanted in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether an object is there."""
        try:
            await asyncio.to_thread(self._files.head, key)
        except FileNotFoundError:
            return False
        return True

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, whole or not at all."""
        self._check_writable()
        await asyncio.to_thread(self._files.write_whole, key, value.to_bytes())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object unless it is there."""
        self._check_writable()
        await asyncio.to_thread(self._files.write_new, key, value.to_bytes())

    async def delete(self, key: str) -> None:
        """Delete an object."""
        self._check_writable()
        work = self._files.call
        await asyncio.to_thread(work, "deleting", key, lambda: obstore.delete(self._files.store, key))


def _made(files: ObjectFiles, read_only: bool) -> ZarrObjects:
    return ZarrObjects(files, read_only=read_only)
