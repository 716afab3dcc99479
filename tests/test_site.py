"""The documentation's site: references have every option and every public name, every page is in the navigation."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ooc_ntk
from ooc_ntk.cli import app

ROOT = Path(__file__).parents[1]
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


def hook(name):
    spec = importlib.util.spec_from_file_location(f"docs_hooks_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return hook("reference")


def test_every_option_of_every_command_is_in_the_reference(reference):
    text = reference.command_line()
    sections = dict(re.findall(r"^## ooc-ntk ([\w-]+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    commands = re.findall(r"^│ (\w+) ", shown[shown.index("Commands") :], re.MULTILINE)
    assert sorted(sections) == sorted(commands)
    for command in commands:
        printed = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"}).output
        lines = [line for line in printed.splitlines() if re.match(r"│ [ *]*--?\w", line)]
        options = {OPTION.search(line).group() for line in lines} - {"--help", "-h"}
        rows = set(re.findall(r"^\| `(-[^`]+)` \|", sections[command], re.MULTILINE))
        named = {name for row in rows for name in row.split(", ")}
        assert options, command
        assert options <= named, command
        assert len(rows) == len(lines) - 1, f"{command}: one row for each option but --help"


def test_what_an_option_says_is_what_its_help_says(reference):
    text = reference.command_line()
    assert "| `--host-memory` | text | Peak memory of the process, or of all of them together, as 16GiB." in text
    assert "| `--weights` | path, several |" in text
    assert "| `--samples` | number | Samples whose rows and columns are recomputed in float64. (default: 8) |" in text
    assert "| `--out` | path | Run directory; an unfinished run in it goes on. **Required.** |" in text
    assert "ooc-ntk plan [JOB_OR_DATA] [MODEL] [OPTIONS]" in text


def test_every_public_name_is_in_the_reference_of_python(reference):
    directives = re.findall(r"^::: ooc_ntk\.(\S+)$", reference.python(), re.MULTILINE)
    assert len(directives) == len(set(directives))
    assert set(ooc_ntk.__all__) - set(directives) == {"__version__"}
    for name in directives:
        if name not in ooc_ntk.__all__:
            module, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(f"ooc_ntk.{module}"), last), name
    public = set(importlib.import_module("ooc_ntk.sklearn").__all__)
    assert {f"sklearn.{name}" for name in public} <= set(directives)


def test_a_name_that_no_group_has_is_listed_all_the_same(reference, monkeypatch):
    monkeypatch.setitem(reference.GROUPS, "Errors", ())
    text = reference.python()
    assert text.index("## Others") < text.index("::: ooc_ntk.InputError")


def test_roles_of_docstrings_are_taken_off(reference):
    assert reference.on_page_content("as for :func:<code>run</code>, :meth:<code>~a.B.c</code>") == (
        "as for <code>run</code>, <code>a.B.c</code>"
    )


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= named


def test_navigation_leaves_out_pages_that_are_not_there(tmp_path):
    (tmp_path / "a.md").write_text("# A")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1.md").write_text("# One")
    entries = [{"A": "a.md"}, {"B": "b.md"}, {"More": [{"C": "c.md"}]}, {"Notes": "notes"}, {"Commands": "cli.md"}]
    found = hook("pages")._present(entries, tmp_path)
    assert found == [{"A": "a.md"}, {"Notes": ["notes/1.md"]}, {"Commands": "cli.md"}]


def test_a_page_that_loads_something_from_elsewhere_is_refused():
    pages = hook("pages")

    class Page:
        class file:  # noqa: N801
            src_uri = "a.md"

    own = '<script src="assets/a.js"></script><a href="https://arxiv.org/abs/1">there</a>'
    assert pages.on_post_page(own, Page) == own
    for loaded in ('<script src="https://x.org/a.js">', '<link rel="stylesheet" href="//x.org/a.css">'):
        with pytest.raises(ValueError, match="from elsewhere"):
            pages.on_post_page(own + loaded, Page)


def test_figures_are_the_planners(frozen):
    figures = hook("figures")
    for page in (ROOT / "docs").glob("*.md"):
        for name in figures.MARK.findall(page.read_text()):
            assert name in figures.FIGURES, page
    table = figures.layers()
    assert re.search(r"of an MLP .* pairwise \|", table)
    assert len(table.splitlines()) == 2 + len(figures.LAYERS)
    replaced = figures.on_page_markdown("before\n<!-- figures: features -->\nafter")
    assert "| 11,200,000 | 42.7 MiB | 16.0 KiB | 40.0 KiB |" in replaced


def test_links_of_the_readme_lead_to_files():
    readme = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert len(targets) > 15
    assert not [target for target in targets if not (ROOT / target).is_file()]
    assert readme.index("<!-- bench:begin -->") < readme.index("<!-- bench:end -->") < readme.index("## Two commands")
