"""Eigenpairs of a kernel on disk, and its alignment with others, as methods of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .krylov import TOLERANCE
from .multiplying import MultipliedKernel

if TYPE_CHECKING:
    from .krylov import Progress
    from .spectrum import Spectrum


class Spectral(MultipliedKernel):
    """What a kernel answers about its eigenvalues and about other kernels."""

    def eigh(
        self,
        k: int | None = None,
        *,
        method: str = "auto",
        tolerance: float = TOLERANCE,
        memory: int | str | None = None,
        seed: int = 0,
        device: str = "cpu",
        advance: Callable[[Progress], None] | None = None,
    ) -> Spectrum:
        """Eigenpairs of the train square: all of them in memory, or the leading ones by products with blocks.

        ``krylov`` is randomised block Krylov (Musco and Musco 2015): block Lanczos from k + 10 random directions (at
        most 128) with full reorthogonalisation, restarted where the basis would exceed the memory; every step is one
        pass over the tiles. ``lobpcg`` is SciPy's, with two to three times as many passes. ``full`` is LAPACK's on the
        dense square in float64. ``auto`` is ``full`` where it fits and is small or much of it is wanted, otherwise
        ``krylov``. Of more than 118 eigenpairs, ``krylov`` may miss copies of one that is there more than 128 times.

        Args:
            k: leading eigenpairs; None for all.
            method: ``auto``, ``full``, ``krylov`` or ``lobpcg``.
            tolerance: a pair is done when ``‖K v − μ v‖`` is at most this share of μ, or rounding; μ is then no further
                off.
            memory: bytes that may be taken beyond what the process holds, as a number or ``"4GiB"``; None is 80% of
                what is free.
            seed: of the random start.
            device: torch device that multiplies.
            advance: told of the progress after each pass.

        Returns:
            The spectrum, which unpacks as ``values, vectors``, values descending. Where the passes do not suffice, it
            comes with a warning, and its residuals say how far it got.

        Raises:
            InputError: for a k that is not from 1 to n, or a wrong method or tolerance.
            BudgetError: if it does not fit the memory; says what would do.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        from .eigen import eigh  # SciPy's eigensolvers are imported when they are needed

        return eigh(
            self,
            k,
            method=method,
            tolerance=tolerance,
            memory=memory,
            seed=seed,
            device=device,
            advance=advance,
        )

    def cka(self, other: MultipliedKernel, *, centered: bool = True, check_data: bool = True) -> float:
        """Centred kernel alignment with another kernel of the same samples (Kornblith et al. 2019).

        ``⟨HKH, HLH⟩ / (‖HKH‖ ‖HLH‖)`` over the train squares, by one pass over both; their tiles may be of different
        sizes.

        Args:
            other: the other kernel: of another run, a layer, a view.
            centered: whether both are centred; otherwise ``⟨K, L⟩ / (‖K‖ ‖L‖)``.
            check_data: whether kernels of runs whose data differ are refused. Train and test data have one digest, so
                that runs with the same train and other test data differ, too.

        Returns:
            From 0 (of positive semi-definite kernels) to 1: the same up to a factor.

        Raises:
            InputError: for another number of rows, or a kernel that is zero.
            RunConflictError: for kernels of other data.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        from .alignment import cka

        return cka(self, other, centered=centered, check_data=check_data)
