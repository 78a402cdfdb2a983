"""Check that the sdist is complete, then compile with the wheel in an environment that does not see the checkout.

Run: python .ci/check_package.py DIST_FOLDER VENV_WITH_THE_WHEEL
The dependencies are those of the interpreter that runs this; the wheel's environment sees its packages through a .pth
file. Such a file does not run the .pth files of the folder it names, so an editable install there stays unseen.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("flexprefill_compile", "passes", "block_masks")


def main() -> None:
    """Check both archives and run the wheel."""
    dist, venv = (Path(argument).resolve() for argument in sys.argv[1:])
    check_contents(dist)
    run_wheel(venv)


def check_contents(dist: Path) -> None:
    """Compare the archives with the checkout: every module, the type marker, the licence and the readme."""
    modules = {str(file.relative_to(ROOT)) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    modules.add("flexprefill_compile/py.typed")
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as zipped:
        in_wheel = set(zipped.namelist())
    require("sdist", modules | {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"}, in_sdist)
    inside = {name.removeprefix("flexprefill_compile/") for name in modules}
    require("wheel", {f"flexprefill_compile/{name}" for name in inside}, in_wheel)


def require(archive: str, wanted: set[str], found: set[str]) -> None:
    """Stop with the list of missing files, if there are any."""
    if missing := sorted(wanted - found):
        sys.exit(f"the {archive} lacks {', '.join(missing)}")


def run_wheel(venv: Path) -> None:
    """Run the wheel's program from an empty folder."""
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    program = Path(__file__).with_name("compile_with_wheel.py")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([venv / "bin" / "python", "-P", program], cwd=folder, check=True)


if __name__ == "__main__":
    main()
