"""What can be added by one file: projections, stores and solvers, found by name in a folder or in an installed plugin.

A registry's own entries are the modules of its folder, each named as what it registers, and imported when that name is
first asked for. Entries of other packages come by the entry point group ``ooc_ntk.plugins``, whose modules are imported
once: the first time that a name is asked for which is not known here, names are listed for a message or a solver is
chosen, or layer rules are looked for. Each registers what it adds::

    [project.entry-points."ooc_ntk.plugins"]
    mine = "my_package.ooc_ntk_plugin"

What a session registers itself, without a plugin, is known in its process alone: workers of a cluster find plugins.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Final, Generic, TypeVar

from .errors import InputError, unknown_name

#: Entry points of packages that add something; each names a module that registers it when it is imported.
PLUGINS: Final = "ooc_ntk.plugins"

Entry = TypeVar("Entry")

_loaded: set[str] = set()


def load_plugins() -> None:
    """Import the plugins of installed packages, those that are not imported yet.

    Raises:
        InputError: if one cannot be imported; names it and its package.
    """
    if PLUGINS in _loaded:
        return
    _loaded.add(PLUGINS)  # before: a plugin may ask for what others have registered
    for point in entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:
            _loaded.discard(PLUGINS)
            package = "an installed package" if point.dist is None else point.dist.name
            raise InputError(
                f"the plugin {point.name!r} of {package} cannot be loaded ({type(error).__name__}: {error}); mend it, "
                "or uninstall it"
            ) from error


def modules_of(folder: str) -> tuple[str, ...]:
    """Names of the modules of a package, sorted; none of them, nor the package, is imported.

    >>> modules_of("ooc_ntk.storage.schemes")
    ('file', 's3')
    """
    spec = find_spec(folder)
    assert spec is not None, folder
    places = list(spec.submodule_search_locations or ())
    return tuple(sorted(each.name for each in pkgutil.iter_modules(places) if not each.name.startswith("_")))


class Registry(Generic[Entry]):
    """Entries of one sort, by name.

    Attributes:
        what: what an entry is, as messages say it.
        folder: the package whose modules are the entries of this project.
    """

    def __init__(self, what: str, folder: str) -> None:
        """Name the folder; nothing is imported."""
        self.what, self.folder = what, folder
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry; what a session or a plugin registered under its name is replaced.

        Raises:
            InputError: if it has the name of one of this project's own.
        """
        if name in self.own() and f"{self.folder}.{name}" not in sys.modules:
            import_module(f"{self.folder}.{name}")
        if name in self.own() and self._entries.get(name, entry) != entry:
            raise InputError(f"there is a {self.what} {name!r} already; register yours under another name")
        self._entries[name] = entry

    def forget(self, name: str) -> None:
        """Take back what was registered under a name, if anything."""
        self._entries.pop(name, None)

    def get(self, name: str) -> Entry:
        """The entry of a name.

        Raises:
            InputError: if there is none; names those that there are.
        """
        if not self._found(name):
            raise unknown_name(self.what, name, self.names())
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Names of all entries, sorted."""
        load_plugins()
        return tuple(sorted({*self.own(), *self._entries}))

    def own(self) -> tuple[str, ...]:
        """Names of this project's own entries, sorted."""
        return modules_of(self.folder)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._found(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _found(self, name: str) -> bool:
        """Look for a name, where it may be."""
        if name not in self._entries and name in self.own():
            import_module(f"{self.folder}.{name}")
        if name not in self._entries:
            load_plugins()
        return name in self._entries
