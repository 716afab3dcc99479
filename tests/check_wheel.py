"""Builds the package and looks at what comes out, in a new environment: ``python -m tests.check_wheel``.

The new environment sees the packages of this one, so that nothing is fetched, and only the wheel itself is installed
into it. Needs the extra ``dev``; takes about twenty seconds.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: What a package beside this one may write, checked by mypy in strict mode.
DOWNSTREAM = """
import numpy as np
import ooc_ntk
from torch import nn

job: ooc_ntk.Job = ooc_ntk.Job(nn.Linear(3, 1), np.zeros((4, 3), dtype=np.float32), projection="sjlt:64")
plan: ooc_ntk.Plan = ooc_ntk.plan(job, ooc_ntk.Budget(host="1GiB"))
kernel: ooc_ntk.Kernel = ooc_ntk.run(job, "run", plan=plan)
size: int = kernel.shape[0] + plan.promised.host_bytes
reveal_type(ooc_ntk.run)
"""


def call(*command: object, folder: Path) -> str:
    """Run a command; its output, or an end with it."""
    done = subprocess.run([str(each) for each in command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check(place: Path) -> None:
    """Build, and check the files, the metadata, the command, the imports and the types."""
    dist = place / "dist"
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT, folder=place)
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    call(sys.executable, "-m", "twine", "check", "--strict", wheel, source, folder=place)

    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"ooc_ntk"}, names
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ooc_ntk").rglob("*") if path.is_file()}
    shipped = {name for name in shipped if "__pycache__" not in name}
    assert shipped <= set(names), f"not in the wheel: {shipped - set(names)}"
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/oracle.py"} <= held

    call(sys.executable, "-m", "venv", "--without-pip", place / "new", folder=place)
    python = place / "new" / "bin" / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=place).strip())
    # Only a path: what other packages' .pth files say there, such as where an editable install lies, is not read.
    (site / "packages.pth").write_text("\n".join(map(str, packages())) + "\n")
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=place)
    version = call(place / "new" / "bin" / "ooc-ntk", "--version", folder=place)
    assert version.split()[-1] in wheel.name, version
    assert "verify" in call(place / "new" / "bin" / "ooc-ntk", "--help", folder=place)
    found = call(python, "-c", "import ooc_ntk, ooc_ntk.api; print(ooc_ntk.__file__)", folder=place)
    assert Path(found.strip()).is_relative_to(site), found

    (place / "downstream.py").write_text(DOWNSTREAM)
    command = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "downstream.py")
    assert "ooc_ntk.algebra.kernel.Kernel" in call(*command, folder=place)
    print(f"{wheel.name}: {len(names)} files; installed, imported, run and type-checked")


def packages() -> list[str]:
    """Folders of this environment's packages."""
    return [path for path in {sysconfig.get_path("purelib"), *sys.path} if path.endswith("site-packages")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))
