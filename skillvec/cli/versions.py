"""What does this skillvec run on? Its kernels, Python and packages, none of which is imported."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("numpy", "safetensors", "torch", "transformers")


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def say_versions() -> list[str]:
    """Return a line each for kernels, Python and packages; UsageError as `in_use` raises it."""
    from skillvec.ops.compiled import explain, in_use

    why = explain()
    rows = [
        ("kernels", f"{in_use()} ({why})" if why else in_use()),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *((package, _find_version(package)) for package in PACKAGES),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {said}" for name, said in rows]
