"""Time and memory of tasks that ran at once in several processes, from their receipts."""

from __future__ import annotations

from collections.abc import Iterable

from ooc_ntk.storage.manifest import Receipt


def wall_seconds(receipts: Iterable[Receipt]) -> float:
    """Seconds in which any of some tasks was at work: those of the driver one after the other, workers' at once.

    >>> wall_seconds([Receipt("a", 2.0), Receipt("b", 1.0)])
    3.0
    >>> wall_seconds([Receipt("a", 2.0, started=5.0, worker="0"), Receipt("b", 2.0, started=6.0, worker="1")])
    3.0
    """
    total, until = 0.0, float("-inf")
    apart = []
    for receipt in receipts:
        if receipt.worker:
            apart.append((receipt.started, receipt.started + receipt.seconds))
        else:
            total += receipt.seconds
    for start, stop in sorted(apart):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total


def together(receipts: Iterable[Receipt]) -> int:
    """The most worker processes that were at work at once.

    >>> together([Receipt("a", 2.0, started=5.0, worker="0"), Receipt("b", 2.0, started=6.0, worker="1")])
    2
    """
    steps = []
    for receipt in receipts:
        if receipt.worker:
            steps += [(receipt.started, 1), (receipt.started + receipt.seconds, -1)]
    most = now = 0
    for _, step in sorted(steps):
        now += step
        most = max(most, now)
    return most


def peak_host_bytes(receipts: Iterable[Receipt]) -> int:
    """Peak resident bytes of the driver and of as many workers as were at work at once, those that took the most.

    >>> peak_host_bytes([Receipt("a", 1.0, peak_host_bytes=5), Receipt("b", 1.0, peak_host_bytes=7, worker="0")])
    12
    """
    found, peaks = list(receipts), dict[str, int]()
    for receipt in found:
        peaks[receipt.worker] = max(peaks.get(receipt.worker, 0), receipt.peak_host_bytes)
    driver = peaks.pop("", 0)
    return driver + sum(sorted(peaks.values(), reverse=True)[: together(found)])
