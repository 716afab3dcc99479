"""Weights from files into models, strictly by name; code inside a file is never run."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch
from torch import nn

from ooc_ntk.errors import InputError, StorageError

_log = logging.getLogger(__name__)

_PICKLED: Final = (".pt", ".pth", ".bin")
#: Keys under which training scripts keep the model's state dict beside the optimizer's.
_CHECKPOINT_KEYS: Final = ("state_dict", "model_state_dict", "model")
_SHOWN: Final = 5  # names shown of a long list; the count says the rest


def load_weights(path: Path | str) -> dict[str, torch.Tensor]:
    """Read a state dict.

    Args:
        path: a ``.safetensors`` file, or a ``.pt``, ``.pth`` or ``.bin`` that ``torch.save`` wrote; a state dict
            under the key ``state_dict`` is taken out, and ``module.`` before every name is dropped.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        InputError: if the file is missing, of another kind, damaged, or holds more than tensors.
    """
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise InputError(f"weights not found: there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            state: object = safetensors.torch.load_file(path, device="cpu")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(f"weights {path} cannot be read as safetensors: {error}; copy the file again") from error
    elif path.suffix in _PICKLED:
        state = _load_pickled(path)
    else:
        raise InputError(
            f"weights {path} end in {path.suffix or 'nothing'!r}; use .safetensors, or {', '.join(_PICKLED)} with a "
            "state dict"
        )
    return _strip_prefix(_state_dict(state, path), path)


def _load_pickled(path: Path) -> object:
    """Load what ``torch.save`` wrote, tensors and plain containers only."""
    try:
        # Mapped where the format allows it: only what is copied into a model takes memory.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "GLOBAL" in text or "Unsupported" in text or zipfile.is_zipfile(path):
            raise InputError(
                f"weights {path} hold more than tensors, and loading that would run code from the file; "
                "save the state dict instead: torch.save(model.state_dict(), path)"
            ) from error
        raise InputError(f"weights {path} are not a file of torch.save: {text.splitlines()[0]}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"weights {path} are damaged or not a file of torch.save ({type(error).__name__}: {error}); copy the file "
            "again"
        ) from error


def _check_sums(path: Path) -> None:
    """Compare what a zip file holds with its checksums, which torch writes but does not look at.

    Raises:
        InputError: if they differ.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(entry.CRC for entry in archive.infolist()):  # torch can be told to write none
                return
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise InputError(f"weights {path} are damaged ({error}); copy the file again") from error
    if damaged is not None:
        raise InputError(f"weights {path} are damaged: the checksum of {damaged} differs; copy the file again")


def _state_dict(state: object, path: Path) -> dict[str, torch.Tensor]:
    """Take the state dict out of what a file holds."""
    if isinstance(state, Mapping):
        kept = next((key for key in _CHECKPOINT_KEYS if isinstance(state.get(key), Mapping)), None)
        if kept is not None:
            _log.info("weights %s: the state dict under %r is taken", path, kept)
            state = state[kept]
    if not isinstance(state, Mapping) or not state:
        raise InputError(
            f"weights {path} hold {'nothing' if isinstance(state, Mapping) else f'a {type(state).__name__}'}, not a "
            "state dict; save it with torch.save(model.state_dict(), path)"
        )
    others = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise InputError(
            f"weights {path} hold {len(others)} values that are no tensors: {_listed(others)}; save only "
            "model.state_dict(), or put it under the key 'state_dict'"
        )
    return {str(key): value.detach() for key, value in state.items()}


def _strip_prefix(state: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Drop the prefixes that DataParallel and torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            _log.info("weights %s: %r dropped from the names of all %d tensors", path, prefix, len(state))
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _listed(names: Iterable[str]) -> str:
    """The first few names of a list, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def _tied_names(state: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """For every name, the names whose tensor is the very same memory, in order, itself included."""
    groups: dict[tuple[object, ...], list[str]] = {}
    tied: dict[str, list[str]] = {}
    for name, tensor in state.items():
        pointer = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        place = (pointer, tensor.device, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        tied[name] = groups.setdefault(place if pointer else (name,), [])
        tied[name].append(name)
    return tied


def check_alike(first: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], where: Path | str) -> None:
    """Refuse weights that are not of the model that others are of.

    Args:
        first: tensors by name.
        other: those that should have the same names and shapes.
        where: file of the others, for messages.

    Raises:
        InputError: naming the first names that differ, and the shapes.
    """
    problems = _differences({name: tuple(value.shape) for name, value in first.items()}, other)
    if problems:
        raise InputError(
            f"weights {where} are not of the same model as the first ones ({len(other)} tensors, there {len(first)}): "
            f"{'; '.join(problems)}; checkpoints must be of one model"
        )


def _differences(own: Mapping[str, tuple[int, ...]], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names that are missing, unexpected or of another shape, as parts of a message."""
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)}, model has {shape}"
        for name, shape in own.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    return [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]


def apply_weights(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put weights into a model, every name exactly once.

    Args:
        model: changed in place; values are cast to its dtypes, which is logged.
        state: tensors by name. A name that is missing is accepted if the model ties it to one that is there.

    Raises:
        InputError: naming the missing and unexpected names and the shapes that differ; or if tied names have
            different values. The model is not changed then.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    tied = _tied_names(own)
    full = dict(state)
    for name in own:
        given = [other for other in tied[name] if other in state]
        if name not in state and given:
            full[name] = state[given[0]]
        elif len(given) > 1 and name != given[0] and not torch.equal(state[name], state[given[0]]):
            raise InputError(
                f"weights for {given[0]} and {name} differ, but the model ties them to one tensor; untie the model or "
                "drop one of them"
            )
    problems = _differences({name: tuple(value.shape) for name, value in own.items()}, full)
    if problems:
        raise InputError(
            f"weights do not belong to this model ({len(own)} tensors in the model, {len(state)} in the weights): "
            f"{'; '.join(problems)}; use the model they were saved from"
        )
    cast = [name for name in own if full[name].dtype != own[name].dtype]
    if cast:
        _log.info("weights of %d tensors are cast to the dtype of the model: %s", len(cast), _listed(cast))
    model.load_state_dict(full, strict=False)  # the names were checked above; extra state is no tensor


def save_weights(model: nn.Module, path: Path | str) -> None:
    """Write the state dict as safetensors: whole or not at all.

    Args:
        model: tensors on any device; of tied ones the first name is kept, which :func:`apply_weights` understands.
        path: the file to write; replaced if it is there.

    Raises:
        StorageError: if it cannot be written.
    """
    path = Path(path)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    tied = _tied_names(own)
    # A clone each: safetensors refuses tensors that share memory in part (a view of a larger buffer).
    kept = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in own.items()
        if tied[name][0] == name
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(kept, temporary, metadata={"format": "pt"})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write the weights to {path}: {error}") from error
