"""Reference pages from the code itself: every command with every option, and every public name of Python."""

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

import ooc_ntk
from ooc_ntk.cli import app
from ooc_ntk.cli.terminal import EXIT_FINDING, EXIT_INPUT, EXIT_STOPPED, EXIT_TERMINATED

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

#: Public names by what they are for; what is not here is listed under "Others".
GROUPS = {
    "Verbs": (
        *("plan", "explain", "run", "extend", "open", "info", "verify", "calibrate"),
        *("fit", "spectrum", "nearest", "surrogate", "run_checkpoints", "open_checkpoints", "open_features"),
    ),
    "What is wanted, and how": ("Job", "Projection", "Budget", "Preferences", "Cluster", "Plan"),
    "Results": ("Kernel", "Features", "Checkpoints"),
    "Extending": (
        *("layer_rule", "forget_layer_rule", "register_projection", "ProjectionKind", "register_store", "StoreScheme"),
        *("register_solver", "Solver", "Featurizer", "ClipOutput"),
    ),
    "Errors": ("OocNtkError", "InputError"),
}

#: Public classes that verbs return or raise, and scikit-learn's estimators.
MORE = {
    "Returned by verbs": (
        *("planning.explain.Explanation", "execution.status.RunInfo", "execution.audit.Audit", "execution.fitting.Fit"),
        *("execution.nearest.NearestResult", "algebra.ridge.Solution", "algebra.spectrum.Spectrum"),
        *("algebra.summary.SpectrumSummary", "algebra.surrogate.SurrogateReport", "algebra.surrogate.Surrogate"),
        *("algebra.checkpoints.Drift", "planning.rates.MachineRates"),
    ),
    "scikit-learn": ("sklearn.NTKRegressor", "sklearn.NTKClassifier", "sklearn.NTKTransformer"),
    "All errors": (
        *("errors.BudgetError", "errors.NonFiniteError", "errors.DataChangedError", "errors.RunConflictError"),
        *("errors.RunLockedError", "errors.RunInterrupted", "errors.StorageError", "errors.TransientStorageError"),
        *("errors.DamagedFileError", "errors.IncompleteRunError", "errors.ClusterError", "errors.VerificationError"),
    ),
}

#: A role before a name, as docstrings have it.
ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):<code>~?")

#: Public names that say nothing by themselves.
NOT_DOCUMENTED = ("__version__",)


def on_files(files: "Files", config: Any) -> "Files":
    """Add both pages."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "cli.md", content=command_line()))
    files.append(File.generated(config, "api.md", content=python()))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Take the roles of reStructuredText off names in docstrings."""
    return ROLE.sub("<code>", html)


def command_line() -> str:
    """Every command, its arguments and its options, as Markdown."""
    parts = [
        "# Command line",
        "`ooc-ntk COMMAND --help` shows the same in a terminal; `ooc-ntk --install-completion` makes the tab key "
        "complete commands, options, their values, and run directories (bash, zsh, fish).",
        f"Exit codes: 0 done, {EXIT_FINDING} a kernel that does not verify, {EXIT_INPUT} a wrong input, a budget too "
        f"small or a disk that cannot be used, {EXIT_STOPPED} stopped by Ctrl-C, {EXIT_TERMINATED} by SIGTERM.",
    ]
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        arguments: list[str] = []
        panels: dict[str, list[str]] = {}
        for label, declared, row in parameters(command.callback):
            if isinstance(declared, ArgumentInfo):
                arguments.append(label)
                panels.setdefault("Arguments", []).append(row)
            else:
                panels.setdefault(declared.rich_help_panel or "Options", []).append(row)
        text = inspect.getdoc(command.callback) or ""
        parts += [f"## ooc-ntk {name}", text, f"```text\nooc-ntk {' '.join([name, *arguments])} [OPTIONS]\n```"]
        for title, rows in panels.items():
            parts.append("\n".join([f"| {title} | value | |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def parameters(callback: Any) -> Iterator[tuple[str, OptionInfo | ArgumentInfo, str]]:
    """Label, declaration and table row of every parameter of a command."""
    hints = get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, declared = get_args(hints.get(name, parameter.annotation))[:2]
        default = parameter.default
        if isinstance(declared, ArgumentInfo):
            label = declared.metavar or name.upper()
            flags = label
            if default is not inspect.Parameter.empty:
                label = f"[{label}]"
        else:
            # Typer takes the first name for a default, as it was before annotations.
            names = (declared.default, *(declared.param_decls or ()))
            flags = ", ".join(each for each in names if isinstance(each, str))
            label = flags
        said = (declared.help or "").replace("|", "\\|")
        if default not in (inspect.Parameter.empty, None, False) and "(default:" not in said:
            said += f" (default: {default})"
        if default is inspect.Parameter.empty and isinstance(declared, OptionInfo):
            said += " **Required.**"
        yield label, declared, f"| `{flags}` | {_value(kind)} | {said} |"


def _value(kind: Any) -> str:
    """What is typed after an option."""
    kinds = [each for each in (get_args(kind) or (kind,)) if each is not type(None)]
    inner = [part for each in kinds for part in (get_args(each) or (each,))]
    name = {"bool": "", "str": "text", "int": "number", "float": "number", "Path": "path"}[inner[0].__name__]
    several = any(get_args(each) for each in kinds) or getattr(kind, "__origin__", None) is list
    return f"{name}, several" if several else name


def python() -> str:
    """Every public name of the package, as directives that mkdocstrings fills from docstrings."""
    parts = [
        "# Python",
        "`import ooc_ntk` brings the names up to *Errors*, and loads nothing heavy itself. Classes after them are what "
        "verbs return and raise, with the module that they are in.",
    ]
    grouped = {name for names in GROUPS.values() for name in names}
    others = tuple(name for name in ooc_ntk.__all__ if name not in grouped and name not in NOT_DOCUMENTED)
    for title, names in {**GROUPS, **({"Others": others} if others else {})}.items():
        parts.append(f"## {title}")
        parts += [f"::: ooc_ntk.{name}" for name in names]
    for title, names in MORE.items():
        parts.append(f"## {title}")
        parts += [f"::: ooc_ntk.{name}\n    options:\n      show_root_full_path: true" for name in names]
    return "\n\n".join(parts) + "\n"
