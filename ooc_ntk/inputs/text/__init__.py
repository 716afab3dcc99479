"""Text: transformer networks from local folders, and files of texts as tokens.

Nothing here is downloaded, and ``transformers`` (extra ``text``) is imported only when a model or a tokenizer is
needed.
"""

from __future__ import annotations

from typing import Final

from .configs import max_tokens, vocabulary_size
from .models import absolute_text_model, build_text_model, tokenizer_place
from .network import TextNetwork
from .sources import TextSource, absolute_text, open_text

__all__ = [
    "MODEL_NAMES",
    "TEXT_NAMES",
    "TextNetwork",
    "TextSource",
    "absolute_text",
    "absolute_text_model",
    "build_text_model",
    "max_tokens",
    "open_text",
    "tokenizer_place",
    "vocabulary_size",
]

#: Names of model specs that :func:`build_text_model` takes.
MODEL_NAMES: Final = ("hf",)

#: Names of data specs that :func:`open_text` takes.
TEXT_NAMES: Final = ("text", "cola")
