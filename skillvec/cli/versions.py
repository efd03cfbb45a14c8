"""What does this skillvec run on? Its kernels, Python and packages, none of which is imported."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

WITH_KERNELS = (
    "arithmetic", "codecs", "comparison", "kernels", "lanes", "merge_kernels", "moments", "philox",
)  # fmt: skip
PACKAGES = ("numpy", "safetensors", "torch", "transformers")


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _check_kernels() -> None:
    """Have every kernel tried, as it is before its first use: what is refused is said after it."""
    merge_kernels = import_module("skillvec.ops.merge_kernels")
    for file in WITH_KERNELS:
        module = import_module(f"skillvec.ops.{file}")
        for name, ask in vars(module).items():
            if name.endswith(("_kernel", "_kernels")) and hasattr(ask, "cache_clear"):
                for of in [(key,) for key in module.DIGESTS] if module is merge_kernels else [()]:
                    ask(*of)


def say_versions() -> list[str]:
    """Return a line each for kernels, Python and packages; UsageError as `in_use` raises it."""
    from skillvec.ops.compiled import explain, in_use

    explain()  # refuses what SKILLVEC_KERNELS asks for and is not here
    _check_kernels()
    why = explain()
    rows = [
        ("kernels", f"{in_use()} ({why})" if why else in_use()),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *((package, _find_version(package)) for package in PACKAGES),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {said}" for name, said in rows]
