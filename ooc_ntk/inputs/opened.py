"""What a user's code reads while a job is loaded and run: the files that Python opens, as its audit events tell.

What native code opens by itself has no such event. Therefore packages are known by name here, those that read files
through Python or none at all; where user code has loaded any other, or names safetensors, nothing is claimed.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any, Final

#: Packages that the engine itself loads, or that read their files through Python.
_KNOWN: Final = frozenset(
    (
        *("annotated_doc", "annotated_types", "attr", "attrs", "backports", "bottleneck"),
        *("charset_normalizer", "click", "cloudpickle", "contourpy", "cuda", "cycler"),
        *("dask", "dateutil", "donfig", "einops", "filelock", "fsspec"),
        *("google_crc32c", "huggingface_hub", "idna", "importlib_metadata", "jinja2", "joblib"),
        *("kiwisolver", "lazy_importer", "lazy_loader", "llvmlite", "locket", "markdown_it"),
        *("markupsafe", "matplotlib", "mdurl", "mlxtend", "mpmath", "msgpack", "msgspec"),
        *("networkx", "numba", "numcodecs", "numexpr", "numpy", "ooc_ntk", "opt_einsum"),
        *("packaging", "pandas", "PIL", "pkg_resources", "psutil", "pydantic", "pydantic_core"),
        *("pygments", "pyparsing", "pytz", "regex", "rich", "safetensors", "scipy"),
        *("setuptools", "shellingham", "six", "sklearn", "sympy", "tblib"),
        *("threadpoolctl", "timm", "tlz", "tokenizers", "toolz", "torch", "torchgen"),
        *("tqdm", "transformers", "triton", "typer", "typing_extensions", "typing_inspection"),
        *("tzdata", "yaml", "zarr", "zict", "zipp"),
    )
)

#: Words in user code that say that something is read which no hook sees: by native code, from elsewhere, of a setting.
_NATIVE_WORDS: Final = (
    *("safetensors", "from_file", "read_csv", "read_parquet", "ctypes", "subprocess", "environ", "getenv"),
    *("urllib", "http.client", "socket", "fsspec", "huggingface_hub"),
)

#: Most files that are worth remembering.
MOST: Final = 1_000

_watching = False
_opened: set[str] = set()
_listed: set[str] = set()


def watch() -> None:
    """Note every file that is opened for reading from now on; called before user code is loaded."""
    global _watching  # noqa: PLW0603 - an audit hook cannot be taken out again
    if not _watching:
        _watching = True
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes) and len(_opened) <= MOST:
        mode, flags = arguments[1], arguments[2]
        if (mode is None or "r" in str(mode)) and not (isinstance(flags, int) and flags & 3):
            _opened.add(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace"))
    elif event in ("os.listdir", "os.scandir") and isinstance(arguments[0], str):
        _listed.add(arguments[0])


def files_read(own: Path) -> list[Path] | None:
    """Files, and folders that were listed, on which user code may depend.

    Args:
        own: a folder whose files do not count: the run directory.

    Returns:
        Paths outside the installation; None where it is not known what else was read.
    """
    inside = [Path(folder).resolve() for folder in [str(own), *_installed()]]
    found: set[Path] = set()
    for name, module in list(sys.modules.items()):
        source = _file_of(module)
        if source is None:
            continue
        file = Path(source).resolve()
        if not file.is_file():  # some modules of torch have names of files that are not there
            continue
        if not _within(file, inside):
            found.add(file)
        elif "site-packages" in file.parts and not _known(name):
            return None
    for file in found:
        try:
            if file.suffix != ".py" or any(word in file.read_text() for word in _NATIVE_WORDS):
                return None
        except (OSError, ValueError):
            return None
    for text in {*_opened, *_listed}:
        path = Path(text).resolve()
        counts = path.is_file() or (text in _listed and path.exists())
        if counts and path.suffix != ".pyc" and not _within(path, inside):
            found.add(path)
    return sorted(found) if len(found) <= MOST else None


def _file_of(module: Any) -> str | None:
    file = getattr(module, "__file__", None)
    return file if isinstance(file, str) and file else None


def _known(name: str) -> bool:
    top = name.partition(".")[0]
    return top in _KNOWN or top.startswith("_")


def _installed() -> list[str]:
    """Folders of Python itself, of installed packages, of this package, and of the system's own files."""
    here = str(Path(__file__).parents[1])
    return [here, sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), "/proc", "/sys", "/dev", "/etc"]


def _within(path: Path, folders: list[Path]) -> bool:
    return any(folder == path or folder in path.parents for folder in folders)
