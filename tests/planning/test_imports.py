"""Planning is pure: it imports with everything heavy blocked."""

import pkgutil
import subprocess
import sys

import ooc_ntk.planning

BLOCKED = ("torch", "numpy", "dask", "distributed", "zarr", "scipy", "psutil", "cupy", "rich", "typer")

PROGRAM = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not set(sys.modules) & set({BLOCKED!r})
import ooc_ntk
print(ooc_ntk.__version__)
"""


def test_planning_imports_nothing_heavy():
    modules = [f"ooc_ntk.planning.{info.name}" for info in pkgutil.iter_modules(ooc_ntk.planning.__path__)]
    assert "ooc_ntk.planning.planner" in modules
    done = subprocess.run([sys.executable, "-c", PROGRAM, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_block_works():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "ooc_ntk.compute.contract"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "is blocked" in done.stderr
