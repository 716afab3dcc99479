"""Every example of the README runs as printed: Python blocks, console lines, and the files that they name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rates import keep_rates

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def _named_file(body: str) -> str | None:
    match = re.match(r"# ([\w.]+\.(?:py|toml))\n", body)
    return match.group(1) if match else None


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def test_blocks_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """One after the other in one folder, as a reader would; later blocks need what earlier ones left."""
    monkeypatch.setenv("OOC_NTK_CACHE", str(tmp_path / "cache"))
    keep_rates()
    for index in range(len(BLOCKS)):
        _run_block(tmp_path, index)


def _run_block(folder: Path, index: int) -> None:
    kind, body = BLOCKS[index]
    name = _named_file(body)
    if name is not None:
        (folder / name).write_text(body)
    elif kind == "python":
        result = subprocess.run(
            [sys.executable, "-c", body],
            cwd=folder,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"block {index}: {result.stderr}"
    elif kind == "console":
        for line in body.splitlines():
            assert line.startswith("$ ooc-ntk "), line
            result = subprocess.run(
                ["bash", "-c", line[2:].replace("ooc-ntk", f"{sys.executable} -m ooc_ntk", 1)],
                cwd=folder,
                env=_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert result.returncode == 0, f"{line}: {result.stderr}"
    else:
        assert kind in ("bash", "text"), f"block {index} of kind {kind} is run by nothing"


def test_set_up_commands_are_the_ones_ci_runs() -> None:
    commands = [body.strip() for kind, body in BLOCKS if kind == "bash"]
    assert commands == [
        'python -m pip install -c tests/constraints.txt ".[demo]" && ooc-ntk demo',
        'python -m pip install -c tests/constraints.txt -e ".[test]" && python -m pytest -n logical --dist worksteal',
    ]
    script = (ROOT / ".ci" / "run").read_text()
    assert (
        'pip install --quiet -c tests/constraints.txt -e ".[test]" && python -m pytest -n logical --dist worksteal'
        in script
    )
