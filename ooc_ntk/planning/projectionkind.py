"""What a kind of random projection is: a few facts for the planner, and the formula of R's entries.

A kind is one module of :mod:`ooc_ntk.planning.kinds`, or is registered by a plugin of another package. Its formula is
written with operators alone, so that the same lines serve NumPy and torch, on any device; that is enough for a kind to
work everywhere. Those of this project have compiled loops beside it, which give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ooc_ntk.errors import InputError
from ooc_ntk.registry import Registry

if TYPE_CHECKING:
    from .projection import Projection

#: Last word of the counters: what the random words of this project's kinds are for.
SIGNS: Final = 0
SJLT: Final = 1
GAUSSIAN: Final = 2
SHIFTS: Final = 3
SHIFT_SIGNS: Final = 4
FACTORS: Final = 5

#: Random words of the projection's seed: ``draw(p, number, purpose)`` gives four arrays of words below 2³², which
#: depend on these three numbers and the seed alone. ``p`` and ``number`` are int64 and broadcast, or whole numbers;
#: ``p`` may have 64 bits, the others have 32.
Draw: TypeAlias = Callable[[Any, Any, int], tuple[Any, Any, Any, Any]]

#: The formula of a kind, see :class:`ProjectionKind`.
Entries: TypeAlias = "Callable[[Projection, Any, Any, Draw], Any]"


@dataclass(frozen=True)
class ProjectionKind:
    """A kind of random projection.

    ``E[R Rᵀ] = I`` must hold once entries are scaled: by ``1/√nonzeros`` of a sparse kind, by ``1/√(unit · dim)`` of a
    dense one. The result may depend on the seed, p and the column alone, or tilings and devices would disagree.

    Attributes:
        summary: a few words, for help texts.
        entries: ``entries(projection, p, index, draw)`` for global parameter indices ``p``. Of a sparse kind they are
            (1, n), ``index`` is (nonzeros, 1) and numbers the blocks of rows: returned are rows within the block, below
            ``projection.block``, and sign bits (1 is minus), both (nonzeros, n). Of a dense kind they are (n, 1),
            ``index`` is (1, k) and has columns: returned are whole numbers from -256 to 256, (n, k).
        nonzeros: of a sparse kind, the default number of non-zeros per parameter; 0 makes it a dense one.
        signs: whether all entries have the same square, so that the variance lacks the squares of single parameters;
            otherwise their fourth moment must be three times the square of the second, as a normal variable's is.
        unit: mean square of a dense kind's whole numbers.
        structured: whether weights of linear layers are sketched from their factors.
        least_nonzeros: fewest non-zeros.
        compiled: whether this project has loops for it, in :mod:`ooc_ntk.compute.projection.compiled` and ``.cuda``.
        version: raised whenever the formula gives other entries, so that features of both are not mixed.
    """

    summary: str
    entries: Entries
    nonzeros: int = 0
    signs: bool = True
    unit: float = 1.0
    structured: bool = False
    least_nonzeros: int = 1
    compiled: bool = False
    version: int = 1

    @property
    def sparse(self) -> bool:
        """Whether R has a few non-zeros per parameter, one in each of as many blocks of rows."""
        return self.nonzeros > 0


#: Every kind of projection, by name.
PROJECTIONS: Final[Registry[ProjectionKind]] = Registry("projection", "ooc_ntk.planning.kinds")


def register_projection(name: str, kind: ProjectionKind) -> None:
    """Add a kind of projection, to be asked for as ``name:dim``.

    Args:
        name: lower-case letters, with - or _ inside.
        kind: what it is.

    Raises:
        InputError: if the name cannot be written on the command line, or is one of this project's own.

    >>> kind = ProjectionKind("one block, no signs", lambda sketch, p, index, draw: (p % sketch.block, p & 0), 1)
    >>> register_projection("modulo", kind)
    >>> PROJECTIONS.get("modulo").sparse
    True
    >>> PROJECTIONS.forget("modulo")
    """
    if not name.replace("-", "").replace("_", "").isalpha() or not name[0].isalpha() or name != name.lower():
        raise InputError(f"a projection is named by lower-case letters, - and _, got {name!r}")
    PROJECTIONS.register(name, kind)
