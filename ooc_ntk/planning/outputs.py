"""Named output functions and which of their outputs are wanted, ``logits[0:3]``, in text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ooc_ntk.errors import InputError, unknown_name

#: Every named output function. The first two have one output per class and can be cut, the others have one in all.
OUTPUTS: Final = ("logits", "logprob", "loss", "margin", "next-token", "clip")
PER_CLASS: Final = ("logits", "logprob")


@dataclass(frozen=True)
class OutputSpec:
    """A named output function, with the part of its outputs that is wanted.

    Attributes:
        name: one of :data:`OUTPUTS`.
        start: first output wanted, None for the first there is.
        stop: one past the last, None for all.
    """

    name: str
    start: int | None = None
    stop: int | None = None

    @property
    def sliced(self) -> bool:
        """Whether only a part is wanted."""
        return self.start is not None or self.stop is not None

    def __str__(self) -> str:
        if not self.sliced:
            return self.name
        start, stop = ("" if bound is None else str(bound) for bound in (self.start, self.stop))
        return f"{self.name}[{start}:{stop}]"

    def part(self, outputs: int) -> slice:
        """The wanted part of so many outputs.

        Raises:
            InputError: if it is not within them.

        >>> OutputSpec.parse("logits[7]").part(10)
        slice(7, 8, None)
        """
        start, stop = self.start or 0, outputs if self.stop is None else self.stop
        if not start < stop <= outputs:
            raise InputError(
                f"outputs {str(self)!r} are out of range: the model has {outputs} "
                f"output{'s' if outputs != 1 else ''}, numbered from 0 to {outputs - 1}"
            )
        return slice(start, stop)

    @classmethod
    def parse(cls, text: str) -> OutputSpec:
        """Read ``logits``, ``logits[7]`` or ``logits[0:3]``.

        Args:
            text: the text.

        Returns:
            The spec.

        Raises:
            InputError: for a name that is not known, a part that cannot be read, or a part of a single output.

        >>> str(OutputSpec.parse("logits[0:3]")), str(OutputSpec.parse("logprob[2]"))
        ('logits[0:3]', 'logprob[2:3]')
        """
        name, bracket, inside = text.strip().partition("[")
        if name not in OUTPUTS:
            raise unknown_name("outputs", name or text, [*OUTPUTS, "file.py:function"])
        if not bracket:
            return cls(name)
        match = re.fullmatch(r"\s*(\d*)\s*(:?)\s*(\d*)\s*\]", inside, flags=re.ASCII)
        if match is None or not (match.group(1) or match.group(3)):
            raise InputError(
                f"cannot read outputs {text!r}; write one number or a range of them from 0 upwards, as logits[7] or "
                "logits[0:3]"
            )
        if name not in PER_CLASS:
            raise InputError(f"outputs {name!r} is one number a sample and has no parts, got {text!r}; leave [...] out")
        first, colon, last = match.groups()
        if not colon:
            return cls(name, int(first), int(first) + 1)
        found = cls(name, int(first) if first else None, int(last) if last else None)
        if found.stop is not None and (found.start or 0) >= found.stop:
            raise InputError(f"outputs {text!r} hold no output; the first number must be the smaller one")
        return found


def is_output_name(text: str) -> bool:
    """Whether a text names an output function, rather than a file with one.

    >>> is_output_name("logits[0:3]"), is_output_name("mine.py:outputs")
    (True, False)
    """
    return text.partition("[")[0].strip() in OUTPUTS
