"""The most similar samples of some samples, with their pictures or texts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ooc_ntk import api
from ooc_ntk.errors import OocNtkError
from ooc_ntk.report.neighbours import summary_lines
from ooc_ntk.report.parts import Gallery, Missing, Part, Section, Text, Thumbnail
from ooc_ntk.report.words import number

from .run import Run

#: Bytes of a kernel up to which neighbours are found for the report where the run keeps none.
QUICK_BYTES: Final = 2**30

#: Neighbours that are shown, samples that they are of, and letters of a text.
SHOWN, SAMPLES, LETTERS = 5, 8, 220

#: Longer side of a picture, pixels (a choice: 74 are shown, and screens have up to twice as many).
SIDE: Final = 96


def nearest(run: Run) -> Section:
    """The most similar train samples of some samples."""
    title, command = "Most similar samples", run.command("nearest")
    kept = run.result("nearest")
    if kept is None or not kept.get("shown"):
        kept = _found(run)
    if kept is None:
        return Section("nearest", title, (Missing("The train samples that are most similar to some samples", command),))
    by = "largest kernel entry" if kept.get("by") == "kernel" else "largest cosine of the kernel"
    lead = f"Of some {kept['rows']} samples the most similar train samples, those with the {by}."
    parts: list[Part] = [Text(lead), *(Text(line) for line in _sentences(kept))]
    if kept.get("note"):
        parts.append(Text(f"Note: {kept['note']}", soft=True))
    pictures, why = _pictures(run, kept)
    rows = [
        (_thumbnail(row, f"{kept['rows']} {row['index']}", pictures, "sample"), *_others(row, pictures))
        for row in kept["shown"]
    ]
    marked = any(each["same_class"] is not None for row in kept["shown"] for each in row["neighbours"])
    caption = "Each line begins with the sample; its neighbours follow, the most similar first, with number and value"
    caption += ", and their class: ✓ the sample’s own, ✗ another." if marked else "."
    if any(each.get("stretched") for each in pictures.values()):
        caption += " Pictures of unknown scale are stretched, each to its own range of values."
    parts.append(Gallery(tuple(rows), caption))
    if why:
        parts.append(Text(f"No pictures: {why}", soft=True))
    return Section("nearest", title, tuple(parts))


def _sentences(kept: Mapping[str, Any]) -> list[str]:
    return [f"{line[0].upper()}{line[1:]}." for line in summary_lines(kept)]


def _found(run: Run) -> dict[str, Any] | None:
    """Neighbours as ``nearest.json`` would have them; None where that would take long or cannot be."""
    kernel = run.kernel
    if kernel is None or kernel.entries_per_sample > 1 or kernel.plan is None or kernel.plan.features_only:
        return None
    if kernel.shape[0] * kernel.shape[1] * kernel.dtype.itemsize > QUICK_BYTES:
        return None
    most = kernel.train_samples - (0 if kernel.test_samples else 1)
    if most < 1:
        return None
    rows = "test" if kernel.test_samples else "train"
    try:
        found = api.nearest(kernel.path, min(SHOWN, most), rows=rows, show=SAMPLES, job=run.job, keep=False)
    except OocNtkError:
        return None
    return found.figures


def _pictures(run: Run, kept: Mapping[str, Any]) -> tuple[dict[tuple[str, int], dict[str, Any]], str]:
    """Addresses of the pictures by ``sample`` or ``train`` and number, or why there are none."""
    shown = kept["shown"]
    if any(row["text"] for row in shown) or kept.get("note") or run.kernel is None:
        return {}, ""
    mine = [int(row["index"]) for row in shown]
    train = [int(each["index"]) for row in shown for each in row["neighbours"][:SHOWN]]
    try:
        found = api.describe_samples(run.kernel.path, str(kept["rows"]), mine, train, job=run.job)
    except (OocNtkError, OSError) as error:
        return {}, str(error)
    addresses = {}
    for what, samples in zip(("sample", "train"), found, strict=True):
        for place, sample in samples.items():
            if sample.pixels is not None:
                addresses[what, place] = {"address": picture_address(sample.pixels), "stretched": sample.stretched}
    return addresses, ""


def picture_address(pixels: NDArray[np.float32]) -> str:
    """Pixels as an address that holds them, no larger than they are shown.

    Args:
        pixels: (height, width) or (height, width, 3) in [0, 1].
    """
    image = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _others(row: Mapping[str, Any], pictures: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[Thumbnail]:
    """The neighbours of a sample."""
    return [
        _thumbnail(each, f"train {each['index']}", pictures, "train", value=each["value"])
        for each in row["neighbours"][:SHOWN]
    ]


def _thumbnail(
    each: Mapping[str, Any],
    name: str,
    pictures: Mapping[tuple[str, int], Mapping[str, Any]],
    what: str,
    value: float | None = None,
) -> Thumbnail:
    lines = [name]
    if value is not None:
        lines.append(number(value))
    if each["label"] is not None:
        label = each["label"]
        lines.append(f"class {label:,}" if isinstance(label, int) else f"target {label:.4g}")
    text = " ".join(str(each["text"] or "").split())
    same = each.get("same_class")
    return Thumbnail(
        lines=tuple(lines),
        picture=str(pictures.get((what, int(each["index"])), {}).get("address", "")),
        text=text if len(text) <= LETTERS else f"{text[:LETTERS]} …",
        mark="" if same is None else "same" if same else "other",
    )
