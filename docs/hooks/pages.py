"""Pages of the site that are files elsewhere, pages that may be missing, and links that lead out of the site."""

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]

#: Files of the repository that are pages, by the page's name.
ELSEWHERE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}

#: Pages that other hooks make.
GENERATED = ("cli.md", "api.md")

#: A link with its text: an image, a page elsewhere and an anchor of the same page are left alone.
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)]*)?\)")

#: What a page would load from elsewhere; a link that a reader follows is none.
LOADED = re.compile(r"<(?:script|img|iframe|link(?![^>]*rel=\"canonical\"))[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+")


def on_config(config: Any) -> Any:
    """Leave out entries of the navigation that have no page, and put in the pages of a folder that is named."""
    config.nav = _present(config.nav, Path(config.docs_dir))
    return config


def _present(entries: list[Any], docs: Path) -> list[Any]:
    found = []
    for entry in entries:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            inside = _present(value, docs)
            if inside:
                found.append({title: inside})
        elif (docs / value).is_dir():
            found.append({title: [f"{value}/{page.name}" for page in sorted((docs / value).glob("*.md"))]})
        elif (docs / value).is_file() or value in GENERATED or _elsewhere(value):
            found.append(entry)
    return found


def _elsewhere(name: str) -> Path | None:
    place = ROOT / ELSEWHERE.get(name, "/")
    return place if place.is_file() else None


def on_files(files: "Files", config: Any) -> "Files":
    """Add the files of the repository that are pages."""
    from mkdocs.structure.files import File

    for name in ELSEWHERE:
        place = _elsewhere(name)
        if place is not None:
            files.append(File.generated(config, name, content=place.read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: "Files") -> str:  # noqa: ARG001
    """Point links at pages of the site; what leads to other files of the repository becomes plain text."""
    source = page.file.src_uri
    home = ELSEWHERE.get(source, f"docs/{source}")
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files}
    pages |= {place: name for name, place in ELSEWHERE.items()} | {"README.md": "index.md", "docs/": "index.md"}

    def pointed(match: re.Match[str]) -> str:
        text, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(home), target))
        if place not in pages:
            return text
        return f"[{text}]({posixpath.relpath(pages[place], posixpath.dirname(source) or '.')}{anchor})"

    return LINK.sub(pointed, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads anything from elsewhere.

    Raises:
        ValueError: naming what it loads.
    """
    found = LOADED.search(output)
    if found:
        raise ValueError(f"{page.file.src_uri} loads something from elsewhere: {found.group()}")
    return output
