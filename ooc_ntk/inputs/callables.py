"""Callable specs: ``pkg.module:name`` and ``path/file.py:name``, the names of a user's own factories and functions."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from ooc_ntk.errors import InputError, unknown_name

from .opened import watch


def is_callable_spec(text: str) -> bool:
    """Whether a text has the form of a callable spec.

    >>> [is_callable_spec(text) for text in ("nets.cnn:build", "a/my nets.py:Net.make", "mnist5k", "x:3")]
    [True, True, False, False]
    """
    place, _, name = text.rpartition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        return False
    return place.endswith(".py") or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", place) is not None


def is_import_path(text: str) -> bool:
    """Whether a text is a callable spec by import path, which depends on what is importable.

    >>> is_import_path("nets.cnn:build"), is_import_path("cnn.py:build"), is_import_path("digits")
    (True, False, False)
    """
    return is_callable_spec(text) and not text.rpartition(":")[0].endswith(".py")


def _split(spec: str, what: str) -> tuple[str, str]:
    """Split a callable spec into place and name."""
    if not is_callable_spec(spec):
        raise InputError(
            f"cannot read {what} {spec!r}; write path/file.py:function or package.module:function, got "
            f"{'no function name' if ':' not in spec else 'something else'}"
        )
    place, _, name = spec.rpartition(":")
    return place, name


def absolute_callable(spec: str, base: Path | None = None, what: str = "function") -> str:
    """Write a callable spec with an absolute file; import paths stay as they are.

    Args:
        spec: the callable spec.
        base: folder that a relative file is relative to; None is the current one.
        what: what the callable is, for messages.

    Returns:
        The spec.

    Raises:
        InputError: if the text is no callable spec.
    """
    place, name = _split(spec, what)
    return f"{_file(place, base)}:{name}" if place.endswith(".py") else spec


def _file(place: str, base: Path | None) -> Path:
    """Absolute and normalised path of a Python file, so that one file is one module."""
    return Path(os.path.normpath(Path.cwd() / (base or ".") / Path(place).expanduser()))


def load_callable(spec: str, base: Path | None = None, what: str = "function") -> object:
    """Load what a callable spec names.

    A file is run once per content that it has, under a module name of its own, with its folder importable; an
    import path is looked up with ``base`` (or the current folder) importable too.

    Args:
        spec: ``pkg.module:name`` or ``path/file.py:name``; the name may have dots.
        base: folder that relative files are relative to; None is the current one.
        what: what the callable is, for messages.

    Returns:
        The object: a function, a class or any other value.

    Raises:
        InputError: if the text is no callable spec, the file or module is missing, its code raises (kept as the
            cause), or it has no such name.
    """
    watch()
    place, name = _split(spec, what)
    module = _load_file(_file(place, base), what) if place.endswith(".py") else _load_module(place, base, what)
    value: object = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = [key for key in vars(value) if not key.startswith("_")] if hasattr(value, "__dict__") else []
            raise unknown_name(f"name in {place} for {what}", part, known)
        value = getattr(value, part)
    return value


def call_factory(spec: str, base: Path | None = None, what: str = "model") -> object:
    """Load a factory and call it without arguments.

    Args:
        spec: the callable spec; a name that is no function is returned as it is.
        base: folder that relative files are relative to; None is the current one.
        what: what the factory makes, for messages.

    Returns:
        What the factory returned.

    Raises:
        InputError: as :func:`load_callable`, or if the factory needs arguments or raises (kept as the cause).
    """
    factory = load_callable(spec, base, what)
    if not (inspect.isroutine(factory) or inspect.isclass(factory) or _is_partial(factory)) or not callable(factory):
        return factory
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise InputError(
            f"{what} {spec!r} cannot be called without arguments ({error}); write a function without arguments that "
            "calls it"
        ) from error
    except ValueError:
        pass  # some built-in callables have no signature; calling them will tell
    with _importable(_folder(spec, base)):
        try:
            return factory()
        except (Exception, SystemExit) as error:
            raise InputError(f"{what} {spec!r} failed: calling it raised {_describe(error)}") from error


def _is_partial(value: object) -> bool:
    """Whether a value is a functools.partial, the one common callable that is neither routine nor class."""
    return hasattr(value, "func") and hasattr(value, "keywords")


def _folder(spec: str, base: Path | None) -> Path:
    """Folder that a user's code expects to be importable."""
    place, _, _ = spec.rpartition(":")
    return _file(place, base).parent if place.endswith(".py") else (Path.cwd() / (base or ".")).absolute()


def _describe(error: BaseException) -> str:
    """Type and text of an exception, with the file and line of a syntax error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put a folder first on the import path for a while."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


class _SourceLoader(SourceFileLoader):
    """Compiles from source every time: a stale ``__pycache__`` never wins, and none is written beside user files."""

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - the interface of the base class
        """Compile the file as it is now."""
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_file(path: Path, what: str) -> ModuleType:
    """Run a Python file as a module of its own."""
    if not path.is_file():
        raise InputError(f"{what}: there is no file {path}; relative paths start at the job file or current folder")
    content = hashlib.blake2b(path.read_bytes(), digest_size=6)
    content.update(str(path).encode())
    module_name = f"ooc_ntk_user_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{content.hexdigest()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path, loader=_SourceLoader(module_name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with _importable(path.parent):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise InputError(f"{what}: running {path} raised {_describe(error)}") from error
    return module


def _load_module(place: str, base: Path | None, what: str) -> ModuleType:
    """Import a module, with the base folder importable."""
    with _importable((Path.cwd() / (base or ".")).absolute()):
        importlib.invalidate_caches()
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and (place == error.name or place.startswith(f"{error.name}.")):
                raise InputError(
                    f"{what}: there is no module {error.name!r}; install it, or give the file as path/file.py:function"
                ) from error
            raise InputError(f"{what}: importing {place} raised {_describe(error)}") from error
        except (Exception, SystemExit) as error:
            raise InputError(f"{what}: importing {place} raised {_describe(error)}") from error
