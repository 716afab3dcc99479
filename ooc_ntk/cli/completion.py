"""Tab completion of values: fixed names, models and data sets by name, run directories."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

#: Levels of folders below what is typed in which runs are looked for (a choice: ``runs/name`` from where one stands).
RUN_LEVELS: Final = 2

#: Folders that are looked into at most, so that a key press is answered at once (a choice).
MOST_FOLDERS: Final = 500

#: Files by which a folder is known to be a run, or to hold several checkpoints.
RUN_FILES: Final = ("plan.json", "checkpoints.json")


def complete(*names: str) -> Callable[[str], list[str]]:
    """Tab completion from fixed names."""

    def matching(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return matching


def complete_model(incomplete: str) -> list[str]:
    """Tab completion of models by name."""
    from ooc_ntk.inputs.zoo.names import model_names

    return [name for name in model_names() if name.startswith(incomplete)]


def complete_data(incomplete: str) -> list[str]:
    """Tab completion of data sets by name."""
    from ooc_ntk.inputs.images.catalog import CATALOG

    names = ["mnist5k", "mnist5k[0:4000]", "digits", "text:", "cola:train", "CIFAR-10_0_2500_0_1000"]
    names += [f"{name}:{split}" for name, entry in CATALOG.items() for split in entry.splits]
    return [name for name in names if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Tab completion of run directories; where there is none, the shell completes files."""
    folder, _, start = incomplete.rpartition("/")
    place = Path(folder or ("/" if incomplete.startswith("/") else "."))
    prefix = incomplete[: len(incomplete) - len(start)]
    return sorted(prefix + found for found in _runs(place) if found.startswith(start))


def _runs(place: Path) -> list[str]:
    """Run directories below a folder, relative to it."""
    found, folders, looked = [], [(place, "", 0)], 0
    while folders and looked < MOST_FOLDERS:
        folder, name, level = folders.pop(0)
        looked += 1
        if name and any((folder / file).is_file() for file in RUN_FILES):
            found.append(name)
        elif level < RUN_LEVELS:
            try:
                inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            except OSError:
                continue
            folders += [
                (folder / each, f"{name}/{each}" if name else each, level + 1)
                for each in inside
                if not each.startswith(".")
            ]
    return found
