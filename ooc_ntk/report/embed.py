"""A page as one file: figures, the scripts that draw them, styles; nothing is loaded, and nothing else may run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import jinja2

from ooc_ntk.errors import InputError
from ooc_ntk.extras import require
from ooc_ntk.storage.atomic import write_whole

from .figures.theme import DARK, LIGHT
from .parts import Figure, Page

#: Random or counted identifiers of Bokeh's models, which differ from one process to the next.
_IDENTIFIER: Final = re.compile(r"p\d+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def require_bokeh() -> None:
    """Refuse to begin without what draws the figures.

    Raises:
        InputError: if Bokeh is not installed.
    """
    require("bokeh", "a report")


def save(page: Page, target: Path) -> Path:
    """Write a page; made again of the same, it is the same to the byte.

    Args:
        page: what it shows.
        target: file to write.

    Raises:
        InputError: if ``target`` is a folder.
        StorageError: if the file cannot be written.
    """
    check_target(target)
    write_whole(target.parent, target.name, render(page).encode())
    return target


def check_target(target: Path) -> None:
    """Refuse a folder as the file of a page.

    Raises:
        InputError: if it is one.
    """
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file for the report, for example {target / 'report.html'}")


def render(page: Page) -> str:
    """A page as HTML, everything that it shows inside.

    Args:
        page: what it shows.
    """
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [*_bokeh_scripts(), (folder / "page.js").read_text()]
    return environment.get_template("page.html.j2").render(
        page=page,
        style=(folder / "page.css").read_text(),
        light=LIGHT,
        dark=DARK,
        figures=_data({"dark": {LIGHT[role]: DARK[role] for role in LIGHT}, "items": _items(page)}),
        scripts=scripts,
        hashes=" ".join(_digest(script) for script in scripts),
    )


@cache
def _bokeh_scripts() -> tuple[str, ...]:
    """BokehJS from the installed package, and no word of it on the console but errors."""
    from bokeh.resources import Resources

    found = Resources(mode="inline", components=["bokeh"], log_level="error").js_raw
    return tuple(
        script.replace("</script", "<\\/script") for script in found if not script.startswith("Bokeh.set_log_level")
    )


def _digest(script: str) -> str:
    """What the page's policy knows a script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _items(page: Page) -> list[Any]:
    """What BokehJS draws: every figure by itself, so that one is not held up by another."""
    return [_item(figure) for section in page.sections for figure in section.figures]


def _item(figure: Figure) -> Any:
    from bokeh.embed import json_item

    return _renamed(json_item(figure.plot, f"figure-{figure.name}"), {})


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """The same with identifiers counted from 1, as those of Bokeh depend on what was drawn before."""
    if isinstance(value, dict):
        return {
            key: names.setdefault(each, f"m{len(names) + 1}")
            if key in ("id", "root_id") and isinstance(each, str) and _IDENTIFIER.fullmatch(each)
            else _renamed(each, names)
            for key, each in value.items()
        }
    return [_renamed(each, names) for each in value] if isinstance(value, list) else value


def _data(value: object) -> str:
    """JSON that may stand in a page: no end of an element in it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
