"""Random projection: which sketch of the Jacobian is wanted, what fits it, and how large it must be for an error."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Final

from ooc_ntk.errors import InputError, unknown_name

from .projectionkind import PROJECTIONS, ProjectionKind

#: The kind of a projection that names none.
DEFAULT_KIND: Final = "sjlt"

#: Kinds of this project, and those of them that are sparse. Plugins may have more: see :data:`PROJECTIONS`.
KINDS: Final = PROJECTIONS.own()
SPARSE_KINDS: Final = tuple(name for name in KINDS if PROJECTIONS.get(name).sparse)

#: Heaviest parameters, whose gradients are kept beside the features for the error bars (measured on small networks:
#: they have 98% to 99.9% of the sum of squared mean squares).
HEAVY: Final = 256

#: Most non-zeros: the signs of a block-shift projection are the bits of one word.
MOST_NONZEROS: Final = 32

#: Rows of a block at least, so that two parameters seldom meet by the block's size alone (a choice).
SMALLEST_BLOCK: Final = 4

#: Rows of a block up to which twice the row and a sign fit 16 bits.
SMALL_BLOCK: Final = 2**15

#: A weight is sketched from its factors if it has this many times more parameters than the sketch has columns.
STRUCTURED_RATIO: Final = 4

#: Backends that may be asked for; ``auto`` takes the fastest that is there.
BACKENDS: Final = ("auto", "numba", "torch", "cupy")


@dataclass(frozen=True)
class Projection:
    """A random projection of the Jacobian, ``Φ = J·R`` with ``E[Φ Φᵀ] = J Jᵀ``: a kernel on the exact scale.

    Attributes:
        kind: ``sjlt`` (sparse, a few signs per parameter, one in each block of rows), ``shift`` (the same, blocks of
            parameters shifted as a whole), ``rademacher`` (dense signs), ``gaussian`` (dense, near normal),
            ``tensorsketch`` (large linear layers sketched from their factors, everything else as ``sjlt``), or one
            that was added by :func:`~ooc_ntk.planning.projectionkind.register_projection`.
        dim: columns of Φ; None has the plan choose them for ``target_error``.
        seed: of the projection, up to 64 bits; the same seed and kind give the same R for any tiling or device.
        nonzeros: signs per parameter of the sparse kinds; 0 takes the default (4; ``tensorsketch`` 32).
        target_error: wanted relative error of the whole kernel in the Frobenius norm, in place of ``dim``.
        backend: what computes it: ``auto``, ``numba``, ``torch`` or ``cupy``.

    Raises:
        InputError: for an unknown kind or backend, or a dim that does not fit the kind.

    >>> Projection("sjlt", dim=10_240).block
    2560
    >>> Projection.parse("rademacher:512").dim
    512
    """

    kind: str = DEFAULT_KIND
    dim: int | None = None
    seed: int = 0
    nonzeros: int = 0
    target_error: float | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check names and numbers, and fill the default of ``nonzeros``."""
        about = PROJECTIONS.get(self.kind) if isinstance(self.kind, str) else None
        if about is None:
            raise unknown_name("projection", str(self.kind), PROJECTIONS.names())
        if self.backend not in BACKENDS:
            raise unknown_name("backend", str(self.backend), BACKENDS)
        for name, value, smallest in (("seed", self.seed, 0), ("nonzeros", self.nonzeros, 0), ("dim", self.dim, 1)):
            if value is None and name == "dim":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value < 2**64:
                raise InputError(f"projection {name} must be a whole number from {smallest} on, got {value!r}")
        if self.dim is None and self.target_error is None:
            raise InputError(
                f"projection {self.kind!r} needs a size: write {self.kind}:4096 (dim=4096), or ask for an error with "
                "target_error=0.02 (--target-error)"
            )
        if self.dim is not None and self.target_error is not None:
            raise InputError(f"give either dim={self.dim} or target_error={self.target_error}, not both")
        error = self.target_error
        number = isinstance(error, int | float) and not isinstance(error, bool)
        if error is not None and not (number and 0 < error < 1):
            raise InputError(f"target_error must lie between 0 and 1, got {error!r}")
        if not about.sparse and self.nonzeros:
            raise InputError(f"a {self.kind} projection is dense and has no nonzeros, got nonzeros={self.nonzeros}")
        if self.nonzeros > MOST_NONZEROS:
            raise InputError(f"nonzeros must be at most {MOST_NONZEROS}, got {self.nonzeros}")
        if 0 < self.nonzeros < about.least_nonzeros:
            why = ": the spread of its blocks is its error" if about.structured else ""
            raise InputError(f"a {self.kind} needs at least {about.least_nonzeros} nonzeros{why}; got {self.nonzeros}")
        if not self.nonzeros:
            object.__setattr__(self, "nonzeros", about.nonzeros)
        if self.dim is not None and self.dim != fitting_dim(self.kind, self.dim, self.nonzeros):
            near = fitting_dim(self.kind, self.dim, self.nonzeros)
            raise InputError(
                f"a {self.kind} projection with {self.nonzeros} non-zeros has a dim that is a multiple of "
                f"{self.nonzeros}, at least {SMALLEST_BLOCK * self.nonzeros}, got {self.dim}; the nearest is {near}"
            )

    @property
    def about(self) -> ProjectionKind:
        """What its kind is."""
        return PROJECTIONS.get(self.kind)

    @property
    def block(self) -> int:
        """Rows of one block of the sparse kinds."""
        assert self.dim is not None
        return self.dim // max(1, self.nonzeros)

    @property
    def text(self) -> str:
        """How it is written on the command line.

        >>> Projection("gaussian", 64).text
        'gaussian:64'
        """
        return self.kind if self.dim is None else f"{self.kind}:{self.dim}"

    @property
    def identity(self) -> str:
        """Everything that decides what R is, as text."""
        size = f"error {self.target_error}" if self.dim is None else self.dim
        version = f" version {self.about.version}" if self.about.version > 1 else ""
        return f"{self.kind} {size} seed {self.seed} nonzeros {self.nonzeros}{version}"

    @classmethod
    def parse(cls, text: str, **options: object) -> Projection:
        """Read ``kind:dim``, ``kind`` or ``dim``.

        Args:
            text: for example ``sjlt:10240``; a number alone takes the default kind.
            options: further fields.

        Raises:
            InputError: if it is neither.
        """
        return cls(**{**parsed_fields(text), **options})  # type: ignore[arg-type]


def parsed_fields(text: str) -> dict[str, object]:
    """Kind and dim of ``kind:dim``, ``kind`` or ``dim``.

    Raises:
        InputError: if it is neither.

    >>> parsed_fields("gaussian:64"), parsed_fields("4096")
    ({'kind': 'gaussian', 'dim': 64}, {'kind': 'sjlt', 'dim': 4096})
    """
    match = re.fullmatch(r"\s*([A-Za-z][A-Za-z_-]*)?\s*:?\s*(\d[\d_]*)?\s*", text)
    if match is None or not any(match.groups()):
        raise InputError(f"cannot read the projection {text!r}; write kind:dim, for example sjlt:4096")
    fields: dict[str, object] = {"kind": (match.group(1) or DEFAULT_KIND).lower()}
    if match.group(2):
        fields["dim"] = int(match.group(2).replace("_", ""))
    return fields


def fitting_dim(kind: str, dim: int, nonzeros: int) -> int:
    """The size nearest to ``dim`` that fits a kind.

    >>> fitting_dim("sjlt", 1023, 4), fitting_dim("gaussian", 1023, 0), fitting_dim("sjlt", 3, 4)
    (1024, 1023, 16)
    """
    if not PROJECTIONS.get(kind).sparse:
        return dim
    return max(SMALLEST_BLOCK, round(dim / nonzeros)) * nonzeros


def check_smaller(dim: int, columns: int) -> None:
    """Refuse a projection that is not smaller than the Jacobian.

    Raises:
        InputError: saying that the exact kernel is cheaper.
    """
    if dim >= columns:
        raise InputError(
            f"a projection to {dim:,} columns is not smaller than the {columns:,} parameters: the exact kernel is "
            "cheaper and has no error; leave the projection out, or choose a smaller dim"
        )


def sketch_digest(projection: Projection, structured: tuple[str, ...], names: tuple[str, ...], model: str) -> str:
    """Digest of what two sets of features must share to be multiplied with each other.

    Args:
        projection: with its dim.
        structured: names of the weights that are sketched from their factors.
        names: names of the parameters.
        model: digest of model and output function.

    Returns:
        32 hex digits.
    """
    text = "\n".join((projection.identity, *structured, "", *names, model))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class EntryMoments:
    """Means over entries of one kind.

    Attributes:
        variance: of a sketch of one column, ``dim`` times an entry's squared standard error (DESIGN: projection).
        square: of the entry itself.
    """

    variance: float
    square: float


@dataclass(frozen=True)
class PilotMoments:
    """What the size of a sketch depends on, from some samples.

    Attributes:
        diagonal: of the diagonal.
        others: of entries of different samples.
        same: of a full kernel, entries of different outputs of one sample.
        outputs: kernel rows of a sample.
        inflation: how much larger the variance of the sketch is than the formula's, as measured.
    """

    diagonal: EntryMoments
    others: EntryMoments
    same: EntryMoments = EntryMoments(0.0, 0.0)
    outputs: int = 1
    inflation: float = 1.0

    def relative_variance(self, rows: int) -> float:
        """``Σ_ij SE_ij²·dim / ‖K‖²_F`` of a kernel of so many rows: divided by dim, the squared relative error.

        Means of the pilot's entries, extrapolated to the counts of such entries.
        """
        n, within = float(rows), min(self.outputs, rows) - 1
        counts = (n, n * within, n * (n - 1 - within))
        parts = (self.diagonal, self.same, self.others)
        variance = sum(count * part.variance for count, part in zip(counts, parts, strict=True))
        norm = sum(count * part.square for count, part in zip(counts, parts, strict=True))
        norm = max(norm, n * self.diagonal.square)  # estimates of squares may be negative, their sum is no less
        return self.inflation * max(0.0, variance) / norm if norm > 0 else 0.0

    def error(self, dim: int, rows: int) -> float:
        """Expected relative Frobenius error of a kernel of so many rows under a sketch of ``dim`` columns."""
        return float((self.relative_variance(rows) / dim) ** 0.5)

    def dim_for(self, projection: Projection, rows: int) -> int:
        """Smallest dim that fits the kind and keeps the expected error below the target."""
        assert projection.target_error is not None
        wanted = self.relative_variance(rows) / projection.target_error**2
        step = max(1, projection.nonzeros)
        dim = -(-max(1, math.ceil(wanted)) // step) * step
        return max(dim, SMALLEST_BLOCK * step if projection.about.sparse else 1)
