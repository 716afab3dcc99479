"""Everything side by side by one command: ``python -m bench``.

Plays all parts, each in a process of its own with a time limit, and writes ``RESULTS.md`` and figures after every one.
With ``--parts`` only some are played; what others gave before is kept in ``records.json`` and stays on the page.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .drawing import draw_all
from .playing import Played, clock, play, play_here
from .process import ROOT, calibrate_once
from .registry import Part, load_parts
from .residual_figures import drawing
from .summary import claims, readme_table, replace_between, results_page

#: Where ``RESULTS.md``, ``records.json`` and figures go unless asked otherwise, and where pages of longer runs lie.
HERE = ROOT / "bench"


def write(parts: dict[str, Part], played: dict[str, Played], out: Path) -> None:
    """Write the page, the records and the figures of what was played so far.

    Args:
        parts: all that there are.
        played: by name those that were.
        out: the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: one.to_json() for name, one in played.items()}
    (out / "records.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    figures: dict[str, list[str]] = {}
    if drawing():
        for name, files in draw_all(played, out / "figures").items():
            figures[name] = [file.relative_to(out).as_posix() for file in files]
    page = results_page(parts, played, figures, HERE / "results")
    if out.resolve() != HERE:  # links of the page lead to pages of longer runs, which are not copied
        page = page.replace("](results/", f"]({os.path.relpath(HERE / 'results', out)}/")
    (out / "RESULTS.md").write_text(page)


def kept_before(parts: dict[str, Part], out: Path, smoke: bool) -> dict[str, Played]:
    """What earlier calls left in the folder in the same size, in the order of the parts."""
    try:
        given = json.loads((out / "records.json").read_text())
        found = {name: Played.from_json(one) for name, one in given.items()}
    except (OSError, ValueError, KeyError, TypeError):  # not there, or of another version
        return {}
    return {name: found[name] for name in parts if name in found and found[name].smoke == smoke}


def play_all(chosen: Sequence[Part], parts: dict[str, Part], out: Path, smoke: bool, patience: float) -> bool:
    """Play parts one after another and write after each.

    Returns:
        Whether all came to their ends.
    """
    played = kept_before(parts, out, smoke) if len(chosen) < len(parts) else {}
    whole = True
    for group in [list(chosen)] if smoke else [[part] for part in chosen]:
        names = ", ".join(part.name for part in group)
        allowed = sum(part.seconds for part in group)
        _say(f"{names} …" if smoke else f"{names}, about {allowed:.0f} s …")
        start = time.monotonic()
        for one in play(group, smoke, patience):
            played[one.name] = one
            whole = whole and not one.failure
            _say(f"{one.name}: {one.seconds:.0f} s{f': {one.failure}' if one.failure else ''}")
        _say(f"{names} took {time.monotonic() - start:.0f} s with starting")
        write(parts, {name: played[name] for name in parts if name in played}, out)
    return whole


def _say(text: str) -> None:
    print(f"{clock()} {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[1] if __doc__ else "")
    parser.add_argument("--parts", help="names, separated by commas (default: all but those that --list says)")
    parser.add_argument("--list", action="store_true", help="print the parts, their seconds and time limits, and end")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works; nothing is judged")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="for RESULTS.md, figures and records")
    parser.add_argument(
        "--readme",
        nargs="?",
        type=Path,
        const=ROOT / "README.md",
        metavar="FILE",
        help="write the table of claims between the markers of FILE as well (README.md)",
    )
    parser.add_argument("--no-run", action="store_true", help="write pages and figures from records.json alone")
    parser.add_argument("--patience", type=float, default=1.0, metavar="FACTOR", help="of all time limits")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--child", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the benchmarks.

    Returns:
        0; 1 if a part did not come to its end.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    parts = load_parts()
    usual = [name for name, part in parts.items() if not part.asked]
    names = usual if given.parts is None else [name.strip() for name in given.parts.split(",")]
    unknown = [name for name in names if name not in parts]
    if unknown:
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join(parts)}")
    if given.patience <= 0 or (given.threads is not None and given.threads < 1):
        parser.error("--patience must be above 0 and --threads at least 1")
    if given.threads:
        torch.set_num_threads(given.threads)
    chosen = [part for name, part in parts.items() if name in names]
    if given.list:
        for part in parts.values():
            asked = " (only if named)" if part.asked else ""
            print(f"{part.name:<12} {part.seconds:4.0f} s, at most {part.limit_seconds:4.0f} s  {part.title}{asked}")
        print(f"{'all':<12} {sum(parts[name].seconds for name in usual):4.0f} s")
        return 0
    if given.child:
        play_here(chosen, given.smoke, given.child)
        return 0
    if given.readme is not None:
        _check_markers(parser, given.readme)
    whole = True
    if given.no_run:
        kept = kept_before(parts, given.out, given.smoke)
        if not kept:
            parser.error(f"--no-run: {given.out / 'records.json'} holds nothing of this size; run without it first")
        write(parts, kept, given.out)
    else:
        calibrate_once()
        whole = play_all(chosen, parts, given.out, given.smoke, given.patience)
    played = kept_before(parts, given.out, given.smoke)
    if not drawing():
        _say("no figures: matplotlib is not installed; pip install 'ooc-ntk[plots]'")
    for claim in claims(parts, played):
        print(f"{claim.figure}: {claim.measured}; bar {claim.bar}: {claim.verdict.strip('*')}")
    print(f"written: {given.out / 'RESULTS.md'}")
    if given.readme is not None:
        text = given.readme.read_text()
        given.readme.write_text(replace_between(text, readme_table(parts, played)))
        print(f"written: the table of {given.readme}")
    return 0 if whole else 1


def _check_markers(parser: argparse.ArgumentParser, readme: Path) -> None:
    """Refuse a file without markers before minutes are spent."""
    try:
        replace_between(readme.read_text(), "")
    except (OSError, ValueError) as error:
        parser.error(f"--readme: {readme}: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part at hand is ended as well
    sys.exit(main())
