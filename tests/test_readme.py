"""Every example of the README runs as printed: Python blocks, console lines, and the files that they name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def _named_file(body: str) -> str | None:
    match = re.match(r"# ([\w.]+\.(?:py|toml))\n", body)
    return match.group(1) if match else None


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OOC_NTK_CACHE": str(folder / "cache"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs_as_printed(folder: Path, index: int) -> None:
    kind, body = BLOCKS[index]
    name = _named_file(body)
    if name is not None:
        (folder / name).write_text(body)
    elif kind == "python":
        result = subprocess.run(
            [sys.executable, "-c", body],
            cwd=folder,
            env=_environment(folder),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    elif kind == "console":
        for line in body.splitlines():
            assert line.startswith("$ ooc-ntk "), line
            result = subprocess.run(
                ["bash", "-c", line[2:].replace("ooc-ntk", f"{sys.executable} -m ooc_ntk", 1)],
                cwd=folder,
                env=_environment(folder),
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
        'python -m pip install -c tests/constraints.txt -e ".[test]" && python -m pytest',
    ]
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -c tests/constraints.txt -e ".[test]" && python -m pytest' in script
