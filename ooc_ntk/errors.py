"""The error tree: one small family, so that a caller can catch everything this package raises on purpose.

Every message says what went wrong, what was found, what the limit is and what to do about it. The command
line turns any :class:`OocNtkError` into one red line and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class OocNtkError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(OocNtkError, ValueError):
    """The job itself is wrong: model, data, names, shapes or values."""


class NonFiniteError(InputError):
    """NaN or infinity was found in weights, inputs or gradients."""


class DataChangedError(InputError):
    """A sample range read twice gave different samples, so the data set shuffles or augments at random."""


class BudgetError(OocNtkError, ValueError):
    """No plan fits the budget; the message names the largest term and the smallest budget that would do.

    Attributes:
        smallest: that budget in bytes, of each memory that is too small, by ``host``, ``device`` or ``disk``.
    """

    smallest: Mapping[str, int] = {}


class RunConflictError(OocNtkError):
    """The output directory belongs to another job or another plan; nothing was overwritten."""


class RunLockedError(OocNtkError):
    """Another process is running in this directory."""


class StorageError(OocNtkError, OSError):
    """A file could not be read or written (disk full, damaged tile, newer manifest)."""


class TransientStorageError(StorageError):
    """A file could not be read or written just now; the task is done again, a bounded number of times."""


class DamagedFileError(StorageError):
    """A committed file is not what was committed.

    Attributes:
        path: the file, relative to the run directory.
    """

    def __init__(self, path: str, message: str) -> None:
        """Name the file and what is wrong."""
        super().__init__(message)
        self.path = path

    def __reduce__(self) -> tuple[type[DamagedFileError], tuple[str, str]]:
        """Travel from process to process."""
        return type(self), (self.path, str(self))


class IncompleteRunError(StorageError):
    """The run directory holds a kernel that is not finished yet."""


class RunInterrupted(OocNtkError):  # noqa: N818 - an outcome, not an error
    """The run was asked to stop; everything committed so far is kept and the run can be resumed.

    Attributes:
        signal: number of the signal that asked, or None.
    """

    def __init__(self, message: str, signal: int | None = None) -> None:
        """Say what is kept, and which signal asked."""
        super().__init__(message)
        self.signal = signal


class ClusterError(OocNtkError):
    """Workers or the scheduler of a cluster were lost; everything committed so far is kept and the run can go on."""


class VerificationError(OocNtkError):
    """A finished kernel did not pass its audit."""


def newer(what: str, found: int, known: int) -> StorageError:
    """The error for what a later version of this package wrote.

    >>> str(newer("the run runs/a", 3, 2))
    'the run runs/a was made by a newer ooc-ntk (format 3, this one reads up to 2); upgrade ooc-ntk'
    """
    return StorageError(
        f"{what} was made by a newer ooc-ntk (format {found}, this one reads up to {known}); upgrade ooc-ntk"
    )


def unknown_name(kind: str, got: str, known: Iterable[str]) -> InputError:
    """Build the error for a name that is not known, with the nearest known names suggested.

    Args:
        kind: what the name is for, as a user would say it (``"kernel"``).
        got: the name given.
        known: every name that would have been accepted.

    Returns:
        An :class:`InputError`, to be raised by the caller.

    >>> str(unknown_name("kernel", "trase", ["trace", "pseudo"]))
    "unknown kernel 'trase'; did you mean 'trace'? Known: pseudo, trace"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(got), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ";"
    return InputError(f"unknown {kind} {got!r}{hint} Known: {', '.join(names)}")
