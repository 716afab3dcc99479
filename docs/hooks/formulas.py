"""Formulas: blocks of ``math`` become MathML while the site is built, so that pages load no script for them."""

import re
from typing import Any

from latex2mathml.converter import convert

BLOCK = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Draw every block of ``math``."""

    def drawn(match: re.Match[str]) -> str:
        formula = convert(match.group(1).strip(), "block").replace("<math ", '<math displaystyle="true" ', 1)
        return f'<div class="formula">{formula}</div>'

    return BLOCK.sub(drawn, markdown)
