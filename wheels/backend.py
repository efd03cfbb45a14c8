"""How pip builds skillvec: by scikit-build-core, with two differences.

What hinders the compiled kernels gives a package without them, a CMake that cannot be found
included. And an editable installation is one line of a .pth file, with the kernels compiled into
the source tree: scikit-build-core's own imports a finder at every start of Python, which also wins
over PYTHONPATH.

    python wheels/backend.py     # compile the kernels into the source tree, as `make test` does
"""

import base64
import hashlib
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from scikit_build_core import build as _skbuild
from scikit_build_core.errors import ScikitBuildError

Settings = dict[str, list[str] | str] | None
MODULE = "skillvec/ops/_native.abi3.so"
# else scikit-build-core takes the compiler that made Python, which may not be here while another is
COMPILER = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
if COMPILER:
    os.environ["CC"] = COMPILER

build_sdist = _skbuild.build_sdist
get_requires_for_build_editable = _skbuild.get_requires_for_build_editable
get_requires_for_build_sdist = _skbuild.get_requires_for_build_sdist
get_requires_for_build_wheel = _skbuild.get_requires_for_build_wheel


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Write the wheel into a folder and return its name; say whether it has kernels (pip -v)."""
    try:
        name = _skbuild.build_wheel(wheel_directory, config_settings, metadata_directory)
    except ScikitBuildError as error:  # no CMake, no Ninja
        print(f"*** {error}")
        pure = {**(config_settings or {}), "wheel.cmake": "false", "wheel.py-api": "py3"}
        name = _skbuild.build_wheel(wheel_directory, pure, metadata_directory)
    if name.endswith("-none-any.whl"):
        print("*** skillvec without compiled kernels: numpy does their work, at a lower speed")
    else:
        print("*** skillvec with compiled kernels")
    return name


def place_kernels(wheel: Path) -> bool:
    """Copy the compiled module of a wheel into the source tree; remove an older one if it has none.

    A running Python may have the old file mapped, so it is replaced, never written into.
    """
    module = Path(MODULE)
    with zipfile.ZipFile(wheel) as archive:
        if MODULE not in archive.namelist():
            module.unlink(missing_ok=True)
            return False
        staged = module.with_suffix(f".{os.getpid()}")
        staged.write_bytes(archive.read(MODULE))
    staged.chmod(0o755)
    staged.replace(module)
    return True


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Write a wheel that holds the path of the source tree; the kernels go into the tree."""
    with tempfile.TemporaryDirectory() as folder:
        name = build_wheel(folder, config_settings, metadata_directory)
        place_kernels(Path(folder, name))
        with zipfile.ZipFile(Path(folder, name)) as whole:
            kept = {n: whole.read(n) for n in whole.namelist() if ".dist-info/" in n}
    record = next(n for n in kept if n.endswith("/RECORD"))
    del kept[record]
    kept["_editable_skillvec.pth"] = f"{Path.cwd()}\n".encode()
    rows = []
    for path, data in kept.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(data)}\n")
    kept[record] = "".join([*rows, f"{record},,\n"]).encode()
    with zipfile.ZipFile(Path(wheel_directory, name), "w") as archive:
        for path, data in kept.items():
            archive.writestr(path, data)
    return name


def main() -> None:
    """Compile into the source tree; fail where there is a compiler and it does not compile them."""
    os.chdir(Path(__file__).parent.parent)
    with tempfile.TemporaryDirectory() as folder:
        placed = place_kernels(Path(folder, build_wheel(folder)))
    if not placed and COMPILER:
        sys.exit(f"{COMPILER} is here, and the kernels were not compiled: see above")
    print(MODULE if placed else "no C compiler here: numpy does the kernels' work")


if __name__ == "__main__":
    main()
