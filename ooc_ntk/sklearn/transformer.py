"""``NTKTransformer``: rows of the kernel for estimators with a precomputed one, or features for linear ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import validate_data
from torch import nn

from ooc_ntk import api
from ooc_ntk.errors import InputError, unknown_name

from .estimator import NTKEstimator, model_inputs
from .recipe import in_memory

#: What ``transform`` may return.
OUTPUTS: Final = ("kernel", "features")


class NTKTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, NTKEstimator):  # type: ignore[misc]
    """Rows ``K(X, X_fit)`` of a network's neural tangent kernel, or random features of it.

    ``output="kernel"`` is for estimators with ``kernel="precomputed"``, after it in a pipeline. ``output="features"``
    gives Φ with ``Φ Φᵀ ≈ K`` for linear ones, and needs a projection. Both are arrays in memory, as scikit-learn wants
    them; :class:`~ooc_ntk.sklearn.NTKRegressor` and :class:`~ooc_ntk.sklearn.NTKClassifier` leave the kernel on disk.

    ``fit`` checks the model on the data and plans; kernels are computed in ``transform`` and ``fit_transform``.

    Args:
        model: as for :class:`~ooc_ntk.sklearn.NTKRegressor`.
        output: ``kernel`` or ``features``.
        kernel: ``trace``, ``pseudo`` or ``output:c``.
        projection: as for the regressor; ``features`` need one.
        normalize: None or ``cosine``; with it features have norm 1.
        parameters: as for the regressor.
        precision: as for the regressor; arrays are float64 whatever it is, as what comes after computes with them.
        device: as for the regressor.
        host_memory: as for the regressor.
        out: run directory in which ``fit_transform`` keeps its kernel or features, and goes on after an interruption.
        random_state: as for the regressor.

    Attributes:
        X_fit_: the samples of ``fit``, if ``output="kernel"``.
        model_: the network.
        plan_: the plan of the fit data's kernel.
        sample_shape_: shape of one sample.
        n_features_in_: features, as scikit-learn counts them.
    """

    def __init__(
        self,
        model: nn.Module | str | Callable[[], nn.Module] | None = None,
        *,
        output: str = "kernel",
        kernel: str = "trace",
        projection: api.Projection | str | None = None,
        normalize: str | None = None,
        parameters: str | Sequence[str] | None = None,
        precision: str = "float64",
        device: str | None = None,
        host_memory: str | int | None = None,
        out: str | Path | None = None,
        random_state: Any = None,
    ) -> None:
        self.model = model
        self.output = output
        self.kernel = kernel
        self.projection = projection
        self.normalize = normalize
        self.parameters = parameters
        self.precision = precision
        self.device = device
        self.host_memory = host_memory
        self.out = out
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> NTKTransformer:  # noqa: N803, ARG002
        """Check model and data, and keep the samples.

        Args:
            X: (samples, ...), finite.
            y: not looked at.

        Returns:
            The transformer.

        Raises:
            ValueError: for data or arguments that are wrong, or a budget too small (:class:`InputError`,
                :class:`BudgetError`).
        """
        self._prepare(X)
        return self

    def fit_transform(self, X: ArrayLike, y: object = None) -> NDArray[np.float64]:  # noqa: N803, ARG002
        """Fit, and transform the same samples: of a kernel only one triangle is computed.

        Args:
            X: (samples, ...), finite.
            y: not looked at.

        Returns:
            (samples, samples), or of features (samples, outputs · dim), float64.

        Raises:
            ValueError: as :meth:`fit`.
            OocNtkError: as :func:`ooc_ntk.run`.
        """
        samples = self._prepare(X)
        if self.output == "kernel":
            return self.recipe_.square(samples, self.out)
        return self._features(samples, self.out)

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """Kernel rows, or features, of some samples.

        Args:
            X: (samples, ...), of the shape of those of ``fit``.

        Returns:
            (samples, fit samples), or of features (samples, outputs · dim), float64.

        Raises:
            ValueError: for data that are wrong, or an array that does not fit in memory (:class:`BudgetError`).
            OocNtkError: as :func:`ooc_ntk.run`.
        """
        samples = self._new_samples(X)
        if self.output == "kernel":
            return self.recipe_.rows(samples, self.X_fit_)
        return self._features(samples, None)

    def _prepare(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Check arguments and samples, and plan; what ``fit`` does. Returns the samples as the model takes them."""
        if self.output not in OUTPUTS:
            raise unknown_name("output", str(self.output), OUTPUTS)
        if self.output == "features" and self.projection is None:
            raise InputError(
                "output='features' needs a projection, as the exact features are all parameters; give "
                "projection='sjlt:1024'"
            )
        given = validate_data(self, X, allow_nd=True)
        recipe = self._recipe(given)
        samples = model_inputs(given, recipe.module)
        self.plan_ = recipe.plan(samples)
        self._keep(recipe.planned(self.plan_), samples)
        self._fit_samples = len(samples)
        if self.output == "kernel":
            self.X_fit_ = samples
        return samples

    @property
    def _n_features_out(self) -> int:
        """Columns of what ``transform`` returns, for names of them."""
        if self.output == "kernel":
            return self._fit_samples
        assert self.plan_.projection is not None
        assert self.plan_.projection.dim is not None
        return self.plan_.rows_per_sample * self.plan_.projection.dim

    def _features(self, samples: NDArray[Any], out: str | Path | None) -> NDArray[np.float64]:
        """Features of samples, (samples, outputs · dim)."""
        found = in_memory(len(samples), self._n_features_out)
        for rows, values in self.recipe_.features(samples, self._fit_samples, out):
            found[rows] = values
        return found
