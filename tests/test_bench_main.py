"""``python -m bench``: every part has a line, peers that break are lines as well, missed bars are called missed."""

import dataclasses
import doctest
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bench.__main__ as command
from bench import bars, drawing, earlier, playing, records, registry, summary
from bench.bars import Bar, Check
from bench.contenders import OURS
from bench.playing import Played
from bench.records import SERIES, Record
from bench.registry import Part
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.compute.rates import rates_path
from ooc_ntk.planning.rates import MachineRates

ROOT = Path(__file__).parents[1]
SETTING = {"date": "2026-01-02T03:04+00:00", "machine": "a, b", "torch": "2", "load": "0.1"}
README = "# Title\n\nbefore <b>\n\n{}\nold\n{}\n\nafter\n"

BROKEN = """
import numpy as np


def broken(model, inputs):
    raise ArithmeticError("broken on purpose")


def absent(model, inputs):
    import no_such_package


PEERS = {"broken peer": broken, "absent peer": absent}
"""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, rates: MachineRates) -> tuple[Path, str, Path]:
    """Folder, output and README of one smoke run with peers that break."""
    with limited_threads(1):
        rates_path("cpu").write_text(rates.to_json())
    folder = tmp_path_factory.mktemp("bench")
    (folder / "broken.py").write_text(BROKEN)
    readme = folder / "README.md"
    readme.write_text(README.format(summary.BEGIN, summary.END))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", registry.PEERS_VARIABLE: str(folder / "broken.py")}
    arguments = ["--smoke", "--threads", "1", "--out", str(folder / "out"), "--readme", str(readme)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out", done.stdout, readme


@pytest.mark.slow
def test_every_part_has_a_section_records_and_a_line_for_each_bar(smoke: tuple[Path, str, Path]) -> None:
    out, text, _ = smoke
    page = (out / "RESULTS.md").read_text()
    kept = json.loads((out / "records.json").read_text())
    usual = [name for name, part in registry.load_parts().items() if not part.asked]
    assert list(kept) == usual == page_parts(page)
    for name, one in kept.items():
        assert one["failure"] == "", (name, one["failure"])
        found = Played.from_json(one)
        assert found.records, name
        judged = [check for check in found.checks if check.limit is not None]
        assert judged, name
        for check in judged:
            assert check.met is None  # smoke size
            assert f"| {check.figure} | " in page
            assert f"{check.figure}: " in text
            assert f"`python -m bench --parts {name}`" in page
    assert "**missed**" not in page
    assert "not complete" not in page.lower()
    for module in ("gpu_exact", "gpu_projection"):
        assert f"- `python -m bench.{module}`: needs an NVIDIA GPU" in page


def page_parts(page: str) -> list[str]:
    lines = [line for line in page.splitlines() if line.startswith("## ") and "`--parts " in line]
    return [line.partition("`--parts ")[2].rstrip("`)") for line in lines]


@pytest.mark.slow
def test_figures_are_drawn_and_linked(smoke: tuple[Path, str, Path]) -> None:
    out, _, _ = smoke
    page = (out / "RESULTS.md").read_text()
    drawn = {path.stem for path in (out / "figures").glob("*.svg")}
    assert drawn == {name for _, name, _, _ in drawing.FIGURES}
    for name in drawn:
        assert f"](figures/{name}.svg)" in page
        assert (out / f"figures/{name}.svg").read_text().count("<path") > 5


@pytest.mark.slow
def test_peers_that_break_are_lines_with_reasons_and_stop_nothing(smoke: tuple[Path, str, Path]) -> None:
    out, text, _ = smoke
    page = (out / "RESULTS.md").read_text()
    found = Played.from_json(json.loads((out / "records.json").read_text())["exact"]).records
    by_name = {record.contender: record for record in found}
    assert by_name["broken peer"].seconds is None
    assert by_name["broken peer"].remark == "ArithmeticError: broken on purpose"
    assert by_name["absent peer"].remark == "ModuleNotFoundError: No module named 'no_such_package'"
    assert "broken on purpose" in page
    assert by_name["per-sample loop"].ratio is not None
    assert by_name["per-sample loop"].error is not None
    assert text.startswith(f"exact kernels{records.NEVER_SLOWER} (")


@pytest.mark.slow
def test_runs_of_ours_give_promises_and_a_kill_costs_no_finished_tile(smoke: tuple[Path, str, Path]) -> None:
    out, _, _ = smoke
    kept = {name: Played.from_json(one) for name, one in json.loads((out / "records.json").read_text()).items()}
    promising = {name for name, one in kept.items() if any(record.promised_seconds for record in one.records)}
    assert promising >= {"exact", "growth", "memory", "outofcore", "interrupted"}
    assert {check.figure: check.value for check in kept["interrupted"].checks}["finished tasks done again"] == 0
    (killed,) = [record for record in kept["interrupted"].records if "killed" in record.figures]
    assert killed.seconds == pytest.approx(killed.figures["killed"] + killed.figures["resumed"])


@pytest.mark.slow
def test_the_readme_changes_between_its_markers_alone(smoke: tuple[Path, str, Path]) -> None:
    _, _, readme = smoke
    text = readme.read_text()
    before, after = README.format(summary.BEGIN, summary.END).split("\nold\n")
    assert text.startswith(f"{before}\n")
    assert text.endswith(f"\n{after}")
    inside = text[len(before) : -len(after)]
    assert "old" not in inside
    assert "| figure | bar | measured |  |" in inside
    assert "`python -m bench --smoke`" in inside


# --- without running anything ----------------------------------------------------------------------------------------


def part_of(measure, name: str = "some", bar: float = 1.0) -> Part:
    return Part(name, name.title(), measure, 1, 2, (Bar("kept", bar), Bar("never told", 2.0)), "exact")


def played(findings: tuple[records.Finding, ...], failure: str = "", *, smoke: bool = False) -> Played:
    return Played("some", SETTING, smoke, 1.0, findings, failure)


def test_a_missed_bar_is_called_missed_and_one_without_a_figure_not_measured() -> None:
    parts = {"some": part_of(None), "other": part_of(None, "other")}
    one = played(
        (bars.checked("kept", 2.0, 1.0, smoke=False), bars.checked("more", 2.0, 1.0, smoke=False, at_least=True))
    )
    claimed = summary.claims(parts, {"some": one})
    first, found = claimed[: len(SERIES)], claimed[len(SERIES) :]
    assert [claim.verdict for claim in first] == ["not measured: no peer gave figures"] * len(SERIES)
    assert [claim.figure.partition(",")[0] for claim in first] == list(SERIES.values()), "a line for each"
    verdicts = [(claim.figure, claim.bar, claim.measured, claim.verdict) for claim in found]
    assert verdicts == [
        ("kept", "≤ 1", "2", "**missed**"),
        ("more", "≥ 1", "2", "met"),
        ("never told", "≤ 2", "–", "not measured: left out, see the part"),
        ("kept", "≤ 1", "–", "not measured: the part was not played"),
        ("never told", "≤ 2", "–", "not measured: the part was not played"),
    ]
    page = summary.results_page(parts, {"some": one}, {}, ROOT / "bench/results")
    assert "| kept | ≤ 1 | 2 | **missed** | `python -m bench --parts some` |" in page
    assert "- part `other`: not played" in page


def test_a_part_that_failed_says_so_at_each_of_its_bars() -> None:
    parts = {"some": part_of(None)}
    one = played(("text",), "stopped after 9 s, its time limit")
    assert [claim.verdict for claim in summary.claims(parts, {"some": one})[len(SERIES) :]] == [
        "not measured: stopped after 9 s, its time limit"
    ] * 2
    assert "**Not complete: stopped after 9 s, its time limit.**" in summary.results_page(
        parts, {"some": one}, {}, ROOT / "bench/results"
    )


@pytest.mark.parametrize(
    ("peer", "met"),
    [
        (Record("w", "fast", 0.5, 64, ratio=0.5), False),
        (Record("w", "fast on few", 0.5, 63, ratio=0.5), True),
        (Record("w", "stopped", 30.0, 64, ratio=30.0, at_least=True), True),
        (Record("w", f"{OURS}, other way", 0.5, 64, ratio=0.5), True),
        (Record("w", "refuses", samples=64, remark="refuses"), True),
    ],
)
def test_never_slower_counts_peers_that_can_do_the_job(peer: Record, met: bool) -> None:
    ours, slow = Record("w", OURS, 1.0, 64, ratio=1.0), Record("v", "slow", 2.0, 128, ratio=2.0)
    everyone = [dataclasses.replace(record, series="algebra") for record in (ours, peer, slow)]
    (check,) = records.never_slower(everyone, smoke=False)
    assert check.met is met
    assert (check.value < 1) is not met


def test_a_part_that_raises_keeps_what_it_gave_and_stops_nothing(tmp_path: Path) -> None:
    def breaks(smoke: bool):
        yield "a line"
        raise ValueError("on purpose")

    def works(smoke: bool):
        yield Check("kept", 1.0, None, 1.0, False, None)

    parts = [part_of(breaks, "breaks"), part_of(works, "works")]
    playing.play_here(parts, True, tmp_path)
    broken, fine = (playing._read(tmp_path, part, SETTING, True, "") for part in parts)
    assert broken.findings == ("a line",)
    assert broken.failure == "ValueError: on purpose"
    assert (fine.failure, [check.figure for check in fine.checks]) == ("", ["kept"])
    assert Played.from_json(json.loads(json.dumps(fine.to_json()))) == fine


def test_a_part_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    (growth,) = (part for name, part in registry.load_parts().items() if name == "growth")
    start = time.monotonic()
    (one,) = playing.play([dataclasses.replace(growth, limit_seconds=0.3)], smoke=True)
    assert time.monotonic() - start < 60
    assert one.failure == "stopped after 0 s, its time limit"
    assert one.findings == ()


def test_findings_that_were_cut_short_are_left_out(tmp_path: Path) -> None:
    lines = [records.to_line("whole"), records.to_line(Record("w", "c", 1.0))[:20]]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    one = playing._read(tmp_path, part_of(None), SETTING, False, "its process ended with status -9")
    assert one.findings == ("whole",)
    assert one.failure == "its process ended with status -9"


def test_parts_that_are_not_played_again_stay_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: part_of(None, name) for name in ("one", "two")}
    calls = []

    def play(group: list[Part], smoke: bool, patience: float) -> list[Played]:
        calls.append([part.name for part in group])
        line = f"call {len(calls)}"
        return [dataclasses.replace(played((line,)), name=part.name) for part in group]

    monkeypatch.setattr(command, "play", play)
    assert command.play_all(list(parts.values()), parts, tmp_path, False, 1.0)
    assert command.play_all([parts["one"]], parts, tmp_path, False, 1.0)
    assert calls == [["one"], ["two"], ["one"]]
    page = (tmp_path / "RESULTS.md").read_text()
    assert "call 1" not in page
    assert page.index("call 3") < page.index("call 2")
    assert command.kept_before(parts, tmp_path, smoke=True) == {}


def test_pages_of_longer_runs_keep_their_figures() -> None:
    found = earlier.earlier(ROOT / "bench/results")
    assert {line.page for line in found} >= {"algebra.md", "cluster.md", "exact.md", "outofcore.md"}
    by_figure = {(line.page, line.figure): line for line in found}
    loop = by_figure["exact.md", "ResNet-18, C = 1, N = 128: best peer / run"]
    assert (loop.bar, loop.measured) == ("≥ 3", "2.59")
    assert loop.verdict.startswith("missed")
    assert all(line.command and line.date for line in found)


@pytest.mark.parametrize("module", [records, summary, drawing])
def test_examples_of_docstrings(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.failed == 0 < found.attempted


def test_parts_fit_a_quarter_of_an_hour() -> None:
    parts = registry.load_parts().values()
    assert sum(part.seconds for part in parts if not part.asked) <= 900
    assert all(part.seconds < part.limit_seconds for part in parts)
    names = [bar.figure for part in parts for bar in part.bars]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "exakt"], "--parts: 'exakt' is none of exact, text, growth"),
        (["--patience", "0"], "--patience must be above 0"),
        (["--no-run", "--out", "/nowhere"], "--no-run: /nowhere/records.json holds nothing"),
        (["--readme", "pyproject.toml"], "needs the lines <!-- bench:begin --> and <!-- bench:end -->"),
    ],
)
def test_wrong_arguments_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
