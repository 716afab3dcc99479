"""Shell completion, asked for as each shell asks: every option with known values offers them, runs are found."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from ooc_ntk.cli import app
from ooc_ntk.cli.completion import complete_run

SHELLS = ("bash", "zsh", "fish")
MAIN = "import sys; sys.argv = ['ooc-ntk']; from ooc_ntk.cli import main; main()"


def asked(shell, words, incomplete, folder=None):
    """What a shell is told when the tab key is pressed after the words and the beginning of another."""
    line = " ".join(["ooc-ntk", *words, incomplete])
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "_OOC_NTK_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(1 + len(words)),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    result = subprocess.run(
        [sys.executable, "-c", MAIN], env=environment, capture_output=True, text=True, check=True, cwd=folder
    )
    text = result.stdout
    if shell == "zsh":  # _arguments '*: :(("a" "b"))', with its colons escaped
        text = text.partition("((")[2].rpartition("))")[0].replace("\\\\:", ":").replace('"', "")
    return set(text.split())


@pytest.fixture
def folder(tmp_path):
    """Two runs, several checkpoints, and folders that are none."""
    for name, file in (("runs/a", "plan.json"), ("runs/b", "plan.json"), ("epochs", "checkpoints.json"), ("data", "x")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_text("{}")
    (tmp_path / ".hidden" / "run").mkdir(parents=True)
    (tmp_path / ".hidden" / "run" / "plan.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_completes_values_models_and_runs(shell, folder):
    assert asked(shell, ["plan", "--kernel"], "emb") == {"embedding", "embedding:*"}
    assert "resnet18_cifar" in asked(shell, ["run", "cifar10"], "resnet18")
    assert asked(shell, ["info"], "", folder) == {"runs/a", "runs/b", "epochs"}


def test_runs_are_found_below_what_is_typed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert complete_run("ru") == ["runs/a", "runs/b"]
    assert complete_run("runs/b") == ["runs/b"]
    assert complete_run(f"{folder}/e") == [f"{folder}/epochs"]
    assert complete_run("nowhere/") == []


#: Options whose values are sizes, patterns, folders, runs or figures of the user's own.
OWN = {"parameters", "host_memory", "device_memory", "disk", "watch_disk", "store", "ridges", "run", "other"}


def options():
    """Every option and argument of every command that text is typed for: command, name, and how it is declared."""
    for command in app.registered_commands:
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
            kind, *declared = get_args(parameter.annotation)
            if str in {kind, *get_args(kind), *(part for each in get_args(kind) for part in get_args(each))}:
                yield command.callback.__name__, name, declared[0]


def test_every_option_with_known_values_completes_them():
    found = list(options())
    assert {"plan", "run", "extend", "fit", "nearest", "spectrum", "surrogate"} <= {command for command, *_ in found}
    for command, name, declared in found:
        if name not in OWN:
            assert declared.autocompletion(""), f"{command} {name} completes nothing"


def test_every_run_argument_completes_runs():
    for command in app.registered_commands:
        parameters = inspect.signature(command.callback, eval_str=True).parameters
        for name in ("run", "other"):
            if name in parameters:
                assert get_args(parameters[name].annotation)[1].autocompletion is complete_run, (
                    command.callback.__name__
                )


def test_completion_is_installed_into_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shown = CliRunner().invoke(app, ["--show-completion", "bash"])
    assert shown.exit_code == 0
    assert "_OOC_NTK_COMPLETE=complete_bash" in shown.output
    installed = CliRunner().invoke(app, ["--install-completion", "bash"])
    assert installed.exit_code == 0, installed.output
    assert any("ooc-ntk" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())
