"""torchvision's weights for ImageNet: from the cache of torch.hub, or through torchvision itself."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import torch
from torch import Tensor

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.weights import load_weights

from .names import IMAGENET

_log = logging.getLogger(__name__)


def pretrained_weights(name: str) -> dict[str, Tensor]:
    """The first weights that torchvision published for a network (``IMAGENET1K_V1``).

    The folder of torch.hub is looked at first; then torchvision downloads them, if it can be imported. Another set of
    weights of the same network (``IMAGENET1K_V2``) is never taken in their place.

    Args:
        name: one of :data:`ooc_ntk.inputs.zoo.names.IMAGENET`.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        InputError: if they are not cached and cannot be downloaded; the message names the file, its address and what
            to do.
    """
    network = IMAGENET[name]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / network.file
    if path.is_file():
        _log.info("weights of %s from %s", name, path)
        return load_weights(path)
    try:
        enum = importlib.import_module("torchvision.models").get_model_weights(name)
        state: dict[str, Tensor] = enum["IMAGENET1K_V1"].get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        others = sorted(file.name for file in folder.glob(f"{name}[-_]*.pth"))
        found = f"; the folder has only {', '.join(others)}, which are others" if others else ""
        raise InputError(
            f"there are no pretrained weights of {name}: {path} does not exist{found}, and torchvision cannot fetch "
            f"them ({type(error).__name__}: {error}); download {network.url} and give the file with "
            f"--weights {network.file}"
        ) from error
    return state
