"""The same command typed again on a finished run: seen without loading the model, the data or torch.

A finished run keeps what command made it and the stamps of every file that the command names. Where nothing of that
changed, and no file of the run did, there is nothing to do. That is make's rule; anything else, or any doubt, is left
to the run itself, which compares digests of model and data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ooc_ntk.errors import StorageError
from ooc_ntk.planning.plan import Plan

from .atomic import write_whole
from .directory import RunDirectory
from .local import file_stamp
from .manifest import Manifest

#: File that holds the command and the stamps, and that of what an audit saw.
AGAIN: Final = "again.json"
AUDIT: Final = "audit.json"


def remember(root: Path, command: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Keep what made a finished run; a run directory that cannot be written is left as it is.

    Args:
        root: the run directory.
        command: what was asked for, in values that JSON has.
        files: files that it depends on.
    """
    with suppress(OSError):
        stamps = {str(path.resolve()): file_stamp(path) for path in files}
        write_whole(root, AGAIN, (json.dumps({"command": command, "stamps": stamps}, indent=2) + "\n").encode())


def is_done(root: Path, command: Mapping[str, Any]) -> bool:
    """Whether a run is finished, by this very command, with files that nobody touched since.

    Args:
        root: the run directory.
        command: what is asked for now.
    """
    directory = RunDirectory(root)
    try:
        kept = json.loads((root / AGAIN).read_text())
        if kept["command"] != json.loads(json.dumps(command)):
            return False
        if any(file_stamp(Path(path)) != stamp for path, stamp in kept["stamps"].items()):
            return False
        if (root / AUDIT).exists() and '"passed": false' in (root / AUDIT).read_text():
            return False
        plan = Plan.load(directory.plan_path)
        manifest = Manifest(root, directory.files, read_only=True)
        try:
            if manifest.meta("plan") != plan.digest or directory.pending_receipts():
                return False
            return plan.is_finished(manifest.keys()) and not manifest.damage(thorough=False).reasons
        finally:
            manifest.close()
    except (OSError, StorageError, ValueError, KeyError, TypeError, AttributeError):
        return False
