"""What the estimators share: how arguments and samples become a recipe for the engine."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from ooc_ntk import api
from ooc_ntk.errors import InputError

from .recipe import Recipe

#: The network where none is given: two hidden layers and one output (measured: about as good as twice or four times the
#: width, or other initial values, on seven small data sets of scikit-learn).
DEFAULT_MODEL: Final = "mlp,width=256,classes=1"

#: Seeds that NumPy's generators give.
SEEDS: Final = 2**31 - 1


class NTKEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Base of the estimators: the kernel's arguments, and samples of any shape that the model takes."""

    model: nn.Module | str | Callable[[], nn.Module] | None
    kernel: str
    projection: api.Projection | str | None
    normalize: str | None
    parameters: str | Sequence[str] | None
    precision: str
    device: str | None
    host_memory: str | int | None
    out: str | Path | None
    random_state: Any

    def __sklearn_tags__(self) -> Any:
        """Say that samples may be images or sequences, too."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _recipe(self, samples: NDArray[Any]) -> Recipe:
        """Fix how kernels are computed.

        Raises:
            InputError: for an argument that is wrong.
        """
        if self.kernel == "full":
            raise InputError(
                "kernel 'full' has a row for every output of a sample, and scikit-learn one per sample; use 'trace', "
                "'pseudo' or 'output:0'"
            )
        seed = self._seed()
        projection = self.projection
        if isinstance(projection, str):
            projection = api.Projection.parse(projection, seed=seed)
        elif projection is not None and not isinstance(projection, api.Projection):
            raise InputError(f"projection must be None, text such as 'sjlt:1024', or a Projection, got {projection!r}")
        return Recipe(
            module=self._module(samples, seed),
            kernel=self.kernel,
            projection=projection,
            normalize=self.normalize,
            parameters=self.parameters,
            precision=self.precision,
            device=self.device,
            host_memory=self.host_memory,
            scratch=None if self.out is None else Path(self.out).absolute().parent,
        )

    def _seed(self) -> int:
        """Seed of what is drawn: ``random_state`` itself if it is a number."""
        drawn = ["network"] if self.model is None else ["projection"] if isinstance(self.projection, str) else []
        if drawn and self.random_state is None and self.out is not None:
            raise InputError(
                f"random_state=None draws another {drawn[0]} in every fit, which out={str(self.out)!r} could not "
                "resume; give random_state=0"
            )
        generator = check_random_state(self.random_state)
        return int(self.random_state if isinstance(self.random_state, Integral) else generator.randint(SEEDS))

    def _module(self, samples: NDArray[Any], seed: int) -> nn.Module:
        """The network: a copy of a module, or a new one."""
        model = self.model
        if isinstance(model, nn.Module):
            return copy.deepcopy(model)  # what is done to the user's must not change a fitted estimator
        if model is None:
            model = f"{DEFAULT_MODEL},seed={seed}"
        if isinstance(model, str):
            return api.Job(model, samples).module()
        if not callable(model):
            raise InputError(
                "model must be None, a torch.nn.Module, a name such as 'mlp,width=64', or a function that returns a "
                f"module, got {type(model).__name__}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = model()
        if not isinstance(made, nn.Module):
            raise InputError(f"model() must return a torch.nn.Module, got {type(made).__name__}")
        return made.eval()

    def _new_samples(self, X: Any) -> NDArray[Any]:  # noqa: N803 - scikit-learn's name
        """X of a fitted estimator, as the model takes it.

        Raises:
            NotFittedError: before fit.
            ValueError: for other features than those of fit, or values that are not finite.
        """
        check_is_fitted(self, "recipe_")
        given = validate_data(self, X, allow_nd=True, reset=False)
        if given.shape[1:] != self.sample_shape_:
            raise InputError(
                f"X has samples of shape {given.shape[1:]}, and {type(self).__name__} was fitted with samples of shape "
                f"{self.sample_shape_}"
            )
        return model_inputs(given, self.recipe_.module)

    def _keep(self, recipe: Recipe, samples: NDArray[Any]) -> None:
        """Set what every fitted estimator has, and drop what another kind of fit has left."""
        for name in {"X_fit_", "coef_"} & set(self.__dict__):
            delattr(self, name)
        self.recipe_ = recipe
        self.model_ = recipe.module
        self.sample_shape_ = samples.shape[1:]


def model_inputs(samples: NDArray[Any], module: nn.Module) -> NDArray[Any]:
    """Whole numbers as floats, unless the model looks them up in an embedding.

    Args:
        samples: (samples, ...), numbers.
        module: the network.
    """
    if samples.dtype.kind == "f" or any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in module.modules()):
        return samples
    return samples.astype(np.float64)


def checked_ridge(ridge: object) -> float:
    """A ridge.

    Raises:
        InputError: unless it is a number from 0 on.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, Real) or not 0 <= float(ridge) < math.inf:
        raise InputError(f"ridge must be a number from 0 on, over the mean diagonal of the kernel, got {ridge!r}")
    return float(ridge)
