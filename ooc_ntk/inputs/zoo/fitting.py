"""What a model's options and the shape of one sample say together: channels, image size, values of a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.inputs.options import NamedSpec, whole_number

#: A sample without the batch axis: (channels, height, width) for images.
SampleShape = tuple[int, ...]


def one_of(spec: NamedSpec, key: str, known: Iterable[str]) -> str:
    """An option that is one of a few words; the first one if it is not given.

    Raises:
        InputError: for another word, with near ones.
    """
    names = list(known)
    value = dict(spec.options).get(key, names[0])
    if value not in names:
        raise unknown_name(f"value of option {key} of model {spec.name}:", value, names)
    return value


def _agreed(spec: NamedSpec, key: str, default: int, found: int | None, shape: SampleShape | None) -> int:
    """An option's value: as given, else as found in the samples, else the default; given and found must agree."""
    value = whole_number(spec, key, default if found is None else found)
    if found is not None and value != found:
        raise InputError(
            f"option {key}={value} of model {str(spec)!r} does not fit the data: samples of shape {shape} have "
            f"{key}={found}; drop the option, or bring the data to it"
        )
    return value


def _check_image(spec: NamedSpec, shape: SampleShape | None) -> None:
    """Check that samples are images (channels, height, width)."""
    if shape is not None and (len(shape) != 3 or min(shape) < 1):
        raise InputError(
            f"model {str(spec)!r} takes images of shape (channels, height, width), and the samples have shape {shape}; "
            "use a model for such data, for example mlp, or reshape the data"
        )


def channels(spec: NamedSpec, shape: SampleShape | None, default: int, *, fixed: bool) -> int:
    """Input channels of a network for images.

    Args:
        spec: the model, with or without the option ``channels``.
        shape: of one sample, or None.
        default: channels without option and samples.
        fixed: whether samples with another number are refused unless the option says so.

    Returns:
        The number.

    Raises:
        InputError: if samples are no images, or do not have the number of channels.
    """
    _check_image(spec, shape)
    found = None if shape is None else shape[0]
    if fixed and found is not None and found != default and "channels" not in dict(spec.options):
        ways = [f"channels={found} to the model, whose first weights are others then"]
        if found == 1:
            ways.insert(0, f"channels={default} to the data, which repeats the grey value")
        raise InputError(
            f"model {str(spec)!r} takes images of {default} channels, and the samples have shape {shape}; add "
            f"{', or '.join(ways)}"
        )
    return _agreed(spec, "channels", default, found, shape)


def size(spec: NamedSpec, shape: SampleShape | None, default: int) -> int:
    """Side of the square images that a network takes, pixels.

    Raises:
        InputError: if samples are no square images, or not of the size that the option ``size`` gives.
    """
    _check_image(spec, shape)
    if shape is not None and shape[1] != shape[2]:
        raise InputError(
            f"model {str(spec)!r} takes square images, and the samples have shape {shape}; resize or crop them"
        )
    return _agreed(spec, "size", default, None if shape is None else shape[1], shape)


def inputs(spec: NamedSpec, shape: SampleShape | None, default: int) -> int:
    """Values of one sample, for a network that flattens it.

    Raises:
        InputError: if samples are empty, or do not have the number of values that the option ``inputs`` gives.
    """
    found = None if shape is None else math.prod(shape)
    if found == 0:
        raise InputError(f"model {str(spec)!r} cannot take samples without values, of shape {shape}")
    return _agreed(spec, "inputs", default, found, shape)
