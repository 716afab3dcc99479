"""What every command shares: the application, errors turned into one line, and how something is shown."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any

import typer

from ooc_ntk.errors import OocNtkError, RunInterrupted, VerificationError
from ooc_ntk.stopping import EXIT_TERMINATED, Terminated, deadline_after_sigterm

#: Exit codes: a finding (a kernel that does not verify), a wrong input or full disk, a stop by Ctrl-C.
#: (That of a stop by SIGTERM is EXIT_TERMINATED.)
EXIT_FINDING, EXIT_INPUT, EXIT_STOPPED = 1, 2, 130

app = typer.Typer(
    name="ooc-ntk",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ooc-ntk {version('ooc-ntk')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Empirical neural tangent kernels larger than memory, exact or projected: planned, resumable, verified."""


@contextmanager
def reporting_errors() -> Iterator[None]:
    """Turn errors raised on purpose, and files that cannot be used, into one line and an exit code.

    Ctrl-C and SIGTERM are taken for the whole command.
    """
    try:
        with deadline_after_sigterm():
            yield
    except RunInterrupted as stopped:
        typer.secho(str(stopped), fg="yellow", err=True)
        raise typer.Exit(EXIT_TERMINATED if stopped.signal == signal.SIGTERM else EXIT_STOPPED) from stopped
    except BrokenPipeError:
        raise
    except VerificationError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(EXIT_FINDING) from error
    except (OocNtkError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(EXIT_INPUT) from error
    except Terminated as stopped:
        typer.secho("stopped by SIGTERM; what is finished is kept", fg="yellow", err=True)
        raise typer.Exit(EXIT_TERMINATED) from stopped
    except KeyboardInterrupt as stopped:
        typer.secho("stopped", fg="yellow", err=True)
        raise typer.Exit(EXIT_STOPPED) from stopped


def show(renderable: Any) -> None:
    """Print a table or text."""
    from rich.console import Console

    # Without a terminal nothing is wrapped: a table in a log file keeps one line per row.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    console.print(renderable)


def heading(text: str) -> None:
    """Print a line in bold."""
    typer.secho(f"\n{text}", bold=True)


@contextmanager
def status(text: str, quiet: bool = False) -> Iterator[None]:
    """Show that something short is going on, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def told(quiet: bool) -> Iterator[Callable[[str, float, float], None] | None]:
    """Show how far something long is, on a terminal: what is being done, how much of it, and of how much.

    Yields:
        What is to be told; None where nobody looks.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def advance(what: str, done: float, total: float) -> None:
            if bar.tasks[0].description != what:
                bar.reset(task, description=what, total=1.0)
            bar.update(task, completed=done / total if total else 1.0)

        yield advance
