"""Models from specs: ``pkg.module:factory`` or ``path/file.py:factory``, with weights from a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ooc_ntk.errors import InputError

from .callables import call_factory
from .weights import apply_weights, load_weights, save_weights

__all__ = ["apply_weights", "load_model", "load_weights", "save_weights"]


def load_model(spec: str, *, weights: Path | str | None = None, base: Path | None = None) -> nn.Module:
    """Build the model that a spec names.

    Args:
        spec: ``pkg.module:factory`` or ``path/file.py:factory``; the factory is a callable without arguments that
            returns a module, or a module itself.
        weights: file with the weights to put into it; None keeps those that the factory made.
        base: folder that relative paths are relative to; None is the current one.

    Returns:
        The module, in eval mode, on the device where the factory left it.

    Raises:
        InputError: if the spec, the user's code or the weights are wrong, or no module comes out.
    """
    model = call_factory(spec, base, "model")
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model {spec!r} gave a {type(model).__name__}, not a torch.nn.Module; name a function that returns one"
        )
    if weights is not None:
        apply_weights(model, load_weights(Path.cwd() / (base or ".") / Path(weights).expanduser()))
    return model.eval()
