"""Nearest samples by FAISS: inner products of projected features (extra ``faiss``)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ooc_ntk.compute.machine import free_host_bytes
from ooc_ntk.errors import BudgetError
from ooc_ntk.extras import require
from ooc_ntk.units import format_bytes

from .features import PANEL_BYTES, Features

#: Share of the free memory that the index may take (a choice).
MEMORY_SHARE: Final = 0.5


def search_features(
    features: Features, rows: str, k: int, *, cosine: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k largest inner products of every sample's features with those of the train samples.

    An ``IndexFlatIP`` over all outputs of a sample side by side: exact on the features, in float32. The products are
    the same ones that the pass over the entries computes; what differs is that the train features are held in memory
    and read once, where the pass reads them again for every thousand rows. It pays where only features were kept, there
    are many thousand rows, and the features are on a disk that is slow and larger than the page cache. Where they come
    from the page cache it hardly does (20,000 train and 5,000 test samples, 1,024 columns, one thread: 3.3 s against
    3.0 s by ``kernel``, 3.5 s against 5.2 s by ``cosine``), and a kernel that is stored is read faster than searched.

    FAISS and torch each bring an OpenMP of their own (on Linux both libgomp, under different names: they work side by
    side in either order of import, but each with all threads). FAISS is therefore held to torch's number of threads.

    Args:
        features: of train and test samples.
        rows: ``test`` or ``train``; a train sample is not its own neighbour.
        k: neighbours of each sample.
        cosine: whether features are brought to length 1.

    Returns:
        Numbers of train samples, (rows, k) int64, −1 where there is none; values, (rows, k) float64, with float32's
        digits, NaN there.

    Raises:
        InputError: if FAISS is not installed.
        BudgetError: if the features of the train samples do not fit in memory.
    """
    faiss = _faiss()
    width = features.outputs * features.dim
    needed = features.train_samples * width * 4 + 2 * PANEL_BYTES
    free = int(MEMORY_SHARE * free_host_bytes())
    if needed > free:
        raise BudgetError(
            f"FAISS holds the features of {features.train_samples:,} train samples, {format_bytes(needed)}, and "
            f"{format_bytes(free)} are free to use; use backend='exact' (--backend exact), which reads them in pieces"
        )
    train = range(features.train_samples)
    square = rows == "train"
    wanted = train if square else range(features.train_samples, features.samples)
    found = []
    with threadpool_limits(torch.get_num_threads()):
        index = faiss.IndexFlatIP(width)
        for piece in _pieces(features, train):
            index.add(_vectors(features, piece, cosine))
        for piece in _pieces(features, wanted):
            values, places = index.search(_vectors(features, piece, cosine), k + square)
            found.append(_in_order(values, places, piece if square else None, k))
    indices, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return indices, values if cosine else values / features.divisor


def _faiss() -> Any:
    return require("faiss", "backend 'faiss'", "use backend='exact' (--backend exact)")


def _pieces(features: Features, samples: range) -> list[range]:
    """Ranges of samples that are read at once."""
    step = len(next(features.panels()))
    return [samples[start : start + step] for start in range(0, len(samples), step)]


def _vectors(features: Features, samples: range, cosine: bool) -> NDArray[np.float32]:
    """Features of some samples as FAISS takes them, all outputs side by side: (samples, outputs · dim) float32."""
    values = features.read(samples).reshape(len(samples), -1)
    if cosine:
        norms = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        values = values * inverse[:, None].astype(values.dtype)
    return np.ascontiguousarray(values, dtype=np.float32)


def _in_order(
    values: NDArray[np.float32], places: NDArray[np.int64], own: range | None, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What FAISS found in this package's order: without the sample itself, the smaller number first of equals."""
    found = values.astype(np.float64)
    missing = places < 0
    if own is not None:
        missing |= places == np.arange(own.start, own.stop)[:, None]
    found[missing] = -np.inf
    order = np.lexsort((places, -found, missing))[:, :k]
    missing = np.take_along_axis(missing, order, 1)
    return (
        np.where(missing, -1, np.take_along_axis(places, order, 1)),
        np.where(missing, np.nan, np.take_along_axis(found, order, 1)),
    )
