"""Tokens of many texts: made once, kept end to end in one array, padded when a range of them is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from ooc_ntk.errors import InputError

from .folders import find_folder, quiet_transformers

#: Texts given to a tokenizer at a time; guessed: enough for its threads, little against memory.
_BATCH: Final = 1000
#: Target where there is no following token; the value that torch's cross-entropy leaves out.
NO_TARGET: Final = -100


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    model_input_names: list[str]
    pad_token_id: int | None
    eos_token_id: int | None
    pad_token_type_id: int

    def __call__(self, *texts: list[str], **options: object) -> Mapping[str, list[list[int]]]:
        """Turn texts, or texts and second texts, into numbers."""


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Tokens of texts, without padding.

    Attributes:
        ids: (all tokens,), int32, text after text.
        offsets: (texts + 1,), int64: where each text starts, and where the last one ends.
        types: (all tokens,), uint8, or None where the tokenizer gives no token types.
        pad_id: token that fills up a text; the mask hides it.
        pad_type: its type.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    types: npt.NDArray[np.uint8] | None
    pad_id: int
    pad_type: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Real tokens of each text, (texts,), int64."""
        return np.diff(self.offsets)

    def padded(self, start: int, stop: int, length: int) -> dict[str, torch.Tensor]:
        """Model inputs of a range of texts.

        Args:
            start: first text.
            stop: one past the last one.
            length: tokens to which all are padded, at least the longest of them.

        Returns:
            ``input_ids``, ``attention_mask`` and, where there are types, ``token_type_ids``: (stop - start, length),
            int64, padded on the right.
        """
        real = self._real(start, stop, length)
        inputs = {"input_ids": self._fill(self.ids, self.pad_id, real, start, stop)}
        inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        if self.types is not None:
            inputs["token_type_ids"] = self._fill(self.types, self.pad_type, real, start, stop)
        return inputs

    def following(self, start: int, stop: int, length: int) -> torch.Tensor:
        """The token after each token.

        Args:
            start: first text.
            stop: one past the last one.
            length: as in :meth:`padded`.

        Returns:
            (stop - start, length), int64; -100 at the last real token and at padding.

        >>> table = TokenTable(np.array([5, 6, 7, 8], np.int32), np.array([0, 3, 4]), None, 0)
        >>> table.following(0, 2, 4).tolist()
        [[6, 7, -100, -100], [-100, -100, -100, -100]]
        """
        real = self._real(start, stop, length)
        ids = self._fill(self.ids, NO_TARGET, real, start, stop)
        return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], NO_TARGET)], dim=1)

    def _real(self, start: int, stop: int, length: int) -> npt.NDArray[np.bool_]:
        """Which places hold real tokens, (stop - start, length)."""
        real: npt.NDArray[np.bool_] = np.arange(length) < np.diff(self.offsets[start : stop + 1])[:, None]
        return real

    def _fill(
        self, values: npt.NDArray[np.integer[Any]], padding: int, real: npt.NDArray[np.bool_], start: int, stop: int
    ) -> torch.Tensor:
        """Values of the real tokens in their places, padding elsewhere."""
        filled = np.full(real.shape, padding, dtype=np.int64)
        filled[real] = values[self.offsets[start] : self.offsets[stop]]
        return torch.from_numpy(filled)

    def digest(self, start: int, stop: int, header: str, targets: torch.Tensor | None) -> str:
        """Digest of a range of texts that depends neither on padding nor on the texts around it.

        Args:
            start: first text.
            stop: one past the last one.
            header: what else makes a difference.
            targets: targets of the range, or None.

        Returns:
            BLAKE2b of 16 bytes, as 32 hexadecimal digits.
        """
        tokens = slice(int(self.offsets[start]), int(self.offsets[stop]))
        parts: list[tuple[str, npt.NDArray[Any]]] = [
            ("lengths", np.diff(self.offsets[start : stop + 1])),
            ("ids", self.ids[tokens]),
        ]
        if self.types is not None:
            parts.append(("types", self.types[tokens]))
        if targets is not None:
            parts.append((f"targets {targets.dtype}", targets.numpy()))
        total = hashlib.blake2b(f"texts {stop - start} {header}".encode(), digest_size=16)
        for name, values in parts:
            content = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16)
            total.update(f"\n{name} {values.size} {content.hexdigest()}".encode())
        return total.hexdigest()


def load_tokenizer(place: str, base: Path | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        place: folder, or package that ships a model with its tokenizer.
        base: folder that a relative path is relative to; None is the current one.

    Returns:
        What ``transformers.AutoTokenizer`` makes of it.

    Raises:
        InputError: if transformers or the folder are missing, or the folder holds no tokenizer that can be read.
    """
    folder = find_folder(place, base, "tokenizer")
    with quiet_transformers() as transformers:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise InputError(
                f"no tokenizer can be loaded from {folder}: {type(error).__name__}: {lines[0]}; give the folder that "
                "the tokenizer's save_pretrained wrote"
            ) from error
    # Where no file with a vocabulary is found, transformers make a tokenizer that knows no word.
    files = {*getattr(tokenizer, "vocab_files_names", {}).values(), "tokenizer.json"}
    if getattr(tokenizer, "vocab_files_names", {}) and not any((folder / name).is_file() for name in files):
        raise InputError(
            f"the folder {folder} holds no tokenizer: none of {', '.join(sorted(files))} is there; copy the "
            "tokenizer's files there, or name another folder with tokenizer=FOLDER"
        )
    return cast("Tokenizer", tokenizer)


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, cut: int | None) -> TokenTable:
    """Turn texts into tokens.

    Args:
        tokenizer: of transformers.
        texts: the texts.
        pairs: the second text of each, or None.
        cut: tokens at which texts are cut, special tokens included, or None.

    Returns:
        The tokens. Without a pad token, padding is the end-of-text token.

    Raises:
        InputError: if the tokenizer fails.
    """
    typed = "token_type_ids" in tokenizer.model_input_names
    ids: list[npt.NDArray[np.int32]] = []
    types: list[npt.NDArray[np.uint8]] = []
    lengths: list[int] = []
    options = {"truncation": cut is not None, "max_length": cut, "verbose": False, "return_attention_mask": False}
    for start in range(0, len(texts), _BATCH):
        part = slice(start, start + _BATCH)
        second = [] if pairs is None else [list(pairs[part])]
        try:
            made = tokenizer(list(texts[part]), *second, return_token_type_ids=typed, **options)
        except Exception as error:
            raise InputError(
                f"the tokenizer {type(tokenizer).__name__} fails on texts {start} to {start + len(texts[part])}: "
                f"{type(error).__name__}: {error}"
            ) from error
        lengths += [len(row) for row in made["input_ids"]]
        ids.append(np.array([token for row in made["input_ids"] for token in row], dtype=np.int32))
        if typed:
            types.append(np.array([kind for row in made["token_type_ids"] for kind in row], dtype=np.uint8))
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    return TokenTable(
        ids=np.concatenate(ids),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(lengths, dtype=np.int64))]),
        types=np.concatenate(types) if typed else None,
        pad_id=int(pad),
        pad_type=int(tokenizer.pad_token_type_id) if typed else 0,
    )
