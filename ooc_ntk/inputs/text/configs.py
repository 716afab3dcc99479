"""Configurations of transformers, and how many tokens a model takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol, cast

from ooc_ntk.errors import InputError

from .folders import find_folder, quiet_transformers

#: Architectures whose positions start after the pad token's number, so that the first ``pad + 1`` are never used.
_OFFSET_POSITIONS: Final = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
#: Tokenizers without a limit say 1e30.
_NO_LIMIT: Final = 10**9


class Config(Protocol):
    """What is used of a configuration of transformers; other values are there for some architectures only."""

    model_type: str
    num_labels: int
    use_cache: bool


def max_tokens(path: str | Path, base: Path | None = None) -> int | None:
    """Most tokens of a text that a model and its tokenizer take.

    Args:
        path: folder or package, as in a spec after ``hf:``.
        base: folder that a relative path is relative to; None is the current one.

    Returns:
        The smaller of the number of positions (RoBERTa and its like lose those up to the pad token's number) and the
        tokenizer's own limit; None where neither says one.

    Raises:
        InputError: if transformers, the folder or its configuration are missing or cannot be read.
    """
    folder = find_folder(str(path), base)
    with quiet_transformers() as transformers:
        config = read_config(transformers, folder)
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        pad = getattr(config, "pad_token_id", None) or 0
        limits.append(positions - pad - 1 if config.model_type in _OFFSET_POSITIONS else positions)
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}  # a folder without a tokenizer, or one that loading the tokenizer will complain about
    own = settings.get("model_max_length") if isinstance(settings, dict) else None
    if isinstance(own, int | float) and 0 < own < _NO_LIMIT:
        limits.append(int(own))
    return min(limits, default=None)


def vocabulary_size(path: str | Path, base: Path | None = None) -> int | None:
    """Different tokens that a model knows; None where its configuration does not say.

    Args:
        path: folder or package, as in a spec after ``hf:``.
        base: folder that a relative path is relative to; None is the current one.

    Raises:
        InputError: as :func:`max_tokens`.
    """
    folder = find_folder(str(path), base)
    with quiet_transformers() as transformers:
        size = getattr(read_config(transformers, folder), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def read_config(transformers: ModuleType, folder: Path) -> Config:
    """Read the configuration of a model of text.

    Args:
        transformers: the module.
        folder: the model's folder.

    Returns:
        A configuration of transformers; of a model of text and images, the part for text.

    Raises:
        InputError: if there is none, it cannot be read, or it is that of an encoder with a decoder.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"there is no config.json in {folder}; give the folder of a model that save_pretrained wrote")
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"cannot read the configuration in {folder}: {first_line(error)}") from error
    config = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"the model in {folder} ({config.model_type}) is an encoder with a decoder, which needs two texts; use an "
            "encoder or a decoder, or wrap it in a function: --model file.py:function"
        )
    return cast("Config", config)


def first_line(error: BaseException) -> str:
    r"""Type and first line of an exception of transformers, whose text can be a page.

    >>> first_line(ValueError("no such model\nread more at"))
    'ValueError: no such model'
    """
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
