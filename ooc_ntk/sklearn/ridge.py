"""``NTKRegressor`` and ``NTKClassifier``: kernel ridge regression whose kernel stays on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data
from torch import nn

from ooc_ntk import api
from ooc_ntk.errors import InputError

from .estimator import NTKEstimator, checked_ridge, model_inputs
from .recipe import feature_panels


class NTKRidge(NTKEstimator):
    """Base of regressor and classifier: coefficients from a run over the fit data, predictions from further ones."""

    def __init__(
        self,
        model: nn.Module | str | Callable[[], nn.Module] | None = None,
        *,
        kernel: str = "trace",
        ridge: float = 1e-3,
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
        self.kernel = kernel
        self.ridge = ridge
        self.projection = projection
        self.normalize = normalize
        self.parameters = parameters
        self.precision = precision
        self.device = device
        self.host_memory = host_memory
        self.out = out
        self.random_state = random_state

    def _solve(self, given: NDArray[Any], targets: NDArray[np.float64]) -> None:
        """Fit coefficients to targets, (samples,) or (samples, targets), after their mean is taken off."""
        ridge = checked_ridge(self.ridge)
        recipe = self._recipe(given)
        samples = model_inputs(given, recipe.module)
        mean = targets.mean(0)
        with recipe.run(samples, out=self.out) as kernel:
            assert kernel.plan is not None
            recipe = recipe.planned(kernel.plan)
            absolute = ridge * float(kernel.sample_diagonal().mean())
            solution = kernel.solve(targets - mean, absolute, budget=recipe.budget)
            weights = None if recipe.projection is None else _weights(kernel, solution.coefficients)
        self._keep(recipe, samples)
        self.intercept_, self.dual_coef_, self.ridge_ = mean, solution.coefficients, solution.ridge
        if weights is None:
            self.X_fit_ = samples
        else:  # a linear model of the features: the fit samples are not needed any more
            self.coef_ = weights

    def _predict(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803 - scikit-learn's name
        """Predictions of the targets, (samples,) or (samples, targets)."""
        samples = self._new_samples(X)
        if self.recipe_.projection is None:
            vectors = self.dual_coef_.reshape(len(self.X_fit_), -1)
            found = self.recipe_.products(samples, self.X_fit_, vectors)
        else:
            vectors = self.coef_.reshape(len(self.coef_), -1)
            found = np.empty((len(samples), vectors.shape[1]))
            for rows, values in self.recipe_.features(samples, len(self.dual_coef_)):
                found[rows] = values @ vectors
        return np.asarray(found.reshape(len(samples), *self.dual_coef_.shape[1:]) + self.intercept_)


def _weights(kernel: api.Kernel, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """``Φᵀ a``: what features of new samples are multiplied with, (features,) or (features, targets)."""
    width = kernel.features.outputs * kernel.features.dim
    found = np.zeros((width, *coefficients.shape[1:]))
    for rows, values in feature_panels(kernel):
        found += values.T @ coefficients[rows]
    return found


class NTKRegressor(RegressorMixin, NTKRidge):  # type: ignore[misc]
    """Kernel ridge regression with a network's neural tangent kernel, which stays on disk.

    ``fit`` computes the kernel of its samples by :func:`ooc_ntk.run` and solves ``(K + ridge·m·I) a = y − mean(y)``
    with m the mean diagonal of K; ``predict`` computes the entries between new samples and those of ``fit``, in batches
    of at most as many as there were (or 4,096), and holds some tiles of them at a time. With a projection, ``predict``
    is linear in the features of the new samples, and those of ``fit`` are not derived again.

    Samples may have any shape that the model takes, ``(samples, channels, height, width)`` for images.

    Args:
        model: a module, of which a copy is taken; the name of a network such as ``mlp,width=64`` or
            ``resnet18_cifar,classes=10``; a function without arguments that returns a module; None takes
            ``mlp,width=256,classes=1``, drawn by ``random_state``. Standardise features first, as for a network.
        kernel: ``trace``, ``pseudo`` or ``output:c``.
        ridge: over the mean diagonal of the kernel, at least 0.
        projection: None for the exact kernel; ``sjlt:1024``, drawn by ``random_state``, or a
            :class:`ooc_ntk.Projection`.
        normalize: None or ``cosine``.
        parameters: patterns of parameter names, as for :class:`ooc_ntk.Job`; None for all.
        precision: of the kernel, ``float64``, ``float32``, ``tf32``, ``bf16`` or ``bf16x3``. In float32 half the memory
            and time, and a sample alone and among others differs in the sixth digit. Predictions are summed in float64
            anyway.
        device: ``cpu`` or ``cuda``; None takes CUDA where there is one.
        host_memory: limit for the whole process while kernels are computed, such as ``4GiB``; None takes 80% of what is
            free.
        out: run directory in which the kernel of ``fit`` is kept; an interrupted ``fit`` of the same data goes on
            there. Temporary runs are then made beside it. None: in the folder of :mod:`tempfile`, which should have
            room for the kernel.
        random_state: seed of the default model, of a function that makes one and of a projection given as text.

    Attributes:
        dual_coef_: (samples,) or (samples, targets) float64.
        coef_: with a projection, (features,) or (features, targets).
        intercept_: mean of the targets.
        ridge_: the absolute ridge.
        X_fit_: the samples of ``fit``, without a projection.
        model_: the network.
        sample_shape_: shape of one sample.
        n_features_in_: features, as scikit-learn counts them.
    """

    def __sklearn_tags__(self) -> Any:
        """Say that there may be several targets."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> NTKRegressor:  # noqa: N803
        """Compute the kernel and solve.

        Args:
            X: (samples, ...), finite.
            y: (samples,) or (samples, targets).

        Returns:
            The estimator.

        Raises:
            ValueError: for data or arguments that are wrong, or a budget too small (:class:`InputError`,
                :class:`BudgetError`).
            OocNtkError: as :func:`ooc_ntk.run`.
        """
        given, targets = validate_data(self, X, y, allow_nd=True, multi_output=True, y_numeric=True)
        self._solve(given, np.asarray(targets, dtype=np.float64))
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """Predict targets.

        Args:
            X: (samples, ...), of the shape of those of ``fit``.

        Returns:
            (samples,) or (samples, targets) float64.

        Raises:
            ValueError: for data that are wrong.
            OocNtkError: as :func:`ooc_ntk.run`.
        """
        return self._predict(X)


class NTKClassifier(ClassifierMixin, NTKRidge):  # type: ignore[misc]
    """Classification by kernel ridge regression on the classes with a network's neural tangent kernel.

    One target per class, 1 for its samples and 0 for others, or −1 and 1 for two classes; the class with the largest
    prediction wins. Scores are no probabilities, and there is no ``predict_proba``.

    Arguments and attributes are those of :class:`NTKRegressor`, and:

    Attributes:
        classes_: the classes, sorted.
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> NTKClassifier:  # noqa: N803
        """Compute the kernel and solve.

        Args:
            X: (samples, ...), finite.
            y: (samples,) classes, two at least.

        Returns:
            The estimator.

        Raises:
            ValueError: for data or arguments that are wrong, or a budget too small (:class:`InputError`,
                :class:`BudgetError`).
            OocNtkError: as :func:`ooc_ntk.run`.
        """
        given, labels = validate_data(self, X, y, allow_nd=True)
        check_classification_targets(labels)
        self.classes_, index = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y holds one class, {self.classes_[0]}; a classifier needs two at least")
        one_hot = index[:, None] == np.arange(len(self.classes_))
        targets = 2 * index - 1 if len(self.classes_) == 2 else one_hot
        self._solve(given, np.asarray(targets, dtype=np.float64))
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:  # noqa: N803
        """Scores of the classes.

        Args:
            X: (samples, ...), of the shape of those of ``fit``.

        Returns:
            (samples, classes) float64; of two classes (samples,), positive for the second one.

        Raises:
            ValueError: for data that are wrong.
            OocNtkError: as :func:`ooc_ntk.run`.
        """
        return self._predict(X)

    def predict(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Predict classes.

        Args:
            X: (samples, ...), of the shape of those of ``fit``.

        Returns:
            (samples,) of :attr:`classes_`.

        Raises:
            ValueError: for data that are wrong.
            OocNtkError: as :func:`ooc_ntk.run`.
        """
        scores = self._predict(X)
        index = scores.argmax(1) if scores.ndim == 2 else (scores > 0).astype(np.int64)
        return np.asarray(self.classes_[index])
