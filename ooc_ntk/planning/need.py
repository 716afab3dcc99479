"""What a layout needs of every memory: what stays throughout, and what each kind of task takes while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

from ooc_ntk.units import format_bytes

#: A kind of memory. ``pinned`` is page-locked host memory; its bytes are counted in ``host`` as well.
Memory = Literal["host", "device", "pinned", "disk"]

#: Kinds of task, in the order in which they first run; no two run at once.
TASK_KINDS: Final = ("rows", "kernel", "release")


@dataclass
class Terms:
    """Bytes by memory and term.

    Attributes:
        host: named terms of host memory, in bytes.
        device: named terms of device memory, in bytes.
        pinned: named terms of page-locked host memory, in bytes; each is a term of ``host`` too.
        disk: named terms of disk space, in bytes.
    """

    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def of(self, memory: str) -> dict[str, int]:
        """Terms of one memory."""
        found: dict[str, int] = getattr(self, memory)
        return found

    def total(self, memory: str) -> int:
        """Bytes of one memory.

        >>> Terms(host={"a": 1, "b": 2}).total("host")
        3
        """
        return sum(self.of(memory).values())


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes needed of each memory; the peak is what is promised.

    Tasks run one after the other and give back what their kind held before another kind begins, so at the peak of a
    memory there is what stays, and what the kind of task takes that takes the most of it.

    Attributes:
        stays: what is held throughout: the process and its libraries, the model, resident tiles, loader processes.
        tasks: what a task of each kind takes beside it, by kind.
    """

    stays: Terms
    tasks: Mapping[str, Terms]

    def heaviest(self, memory: str) -> str:
        """The kind of task that takes the most of one memory."""
        return max(self.tasks, key=lambda kind: self.tasks[kind].total(memory))

    def _peak(self, memory: str) -> dict[str, int]:
        return {**self.stays.of(memory), **self.tasks[self.heaviest(memory)].of(memory)}

    @cached_property
    def host(self) -> Mapping[str, int]:
        """Terms of host memory at its peak, in bytes."""
        return self._peak("host")

    @cached_property
    def device(self) -> Mapping[str, int]:
        """Terms of device memory at its peak, in bytes."""
        return self._peak("device")

    @cached_property
    def pinned(self) -> Mapping[str, int]:
        """Terms of page-locked host memory at its peak, in bytes."""
        return self._peak("pinned")

    @cached_property
    def disk(self) -> Mapping[str, int]:
        """Terms of disk space at its peak, in bytes."""
        return self._peak("disk")

    def total(self, memory: str) -> int:
        """Bytes needed of ``host``, ``device``, ``pinned`` or ``disk``."""
        return sum(getattr(self, memory).values())

    def largest(self, memory: str) -> str:
        """The largest term of one memory, in words, with the kind of task that it is of.

        >>> MemoryNeed(Terms(), {"rows": Terms(host={"staging slab": 2**20})}).largest("host")
        'staging slab (1.0 MiB, of rows tasks)'
        """
        terms: Mapping[str, int] = getattr(self, memory)
        name = max(terms, key=lambda term: terms[term])
        kind = "" if name in self.stays.of(memory) else f", of {self.heaviest(memory)} tasks"
        return f"{name} ({format_bytes(terms[name])}{kind})"
