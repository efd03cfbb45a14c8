"""Use the skillvec that is installed for diff, apply and verify: cibuildwheel's test of a wheel.

    python wheels/try_wheel.py     # prints what `skillvec --version -v` says

With the kernels of the wheel and with numpy the files must be the same, and BASE + v be TUNED.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

NUMEL = 70_001


def call(folder: Path, *arguments: str, kernels: str) -> str:
    """Run skillvec in a folder and return what it prints; not that of a checkout around it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-m", "skillvec", *arguments], cwd=folder, check=True,
                          env=environment | {"SKILLVEC_KERNELS": kernels},
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    return done.stdout


def data_of(path: Path) -> bytes:
    """Return what stands behind the header, which has a date."""
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def write_models(folder: Path) -> dict[str, np.ndarray]:
    """Write base and tuned; return tuned's tensors."""
    rng = np.random.default_rng(3)
    base = {"half": rng.standard_normal(NUMEL).astype(np.float16),
            "whole": rng.standard_normal((NUMEL, 1)).astype(np.float32)}  # fmt: skip
    tuned = {name: x + (rng.random(x.shape) < 0.3).astype(x.dtype) / 64 for name, x in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return tuned


def main() -> None:
    written = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tuned = write_models(folder)
        for kernels in ("", "numpy"):
            v, out = folder / f"v{kernels}.safetensors", folder / f"out{kernels}.safetensors"
            call(folder, "diff", "tuned.safetensors", "base.safetensors", "-o", v.name,
                 "--quiet", kernels=kernels)  # fmt: skip
            call(folder, "apply", "base.safetensors", v.name, "-o", out.name, "--quiet",
                 kernels=kernels)  # fmt: skip
            for made in (v, out):
                call(folder, "verify", made.name, "--quiet", kernels=kernels)
            written.append((data_of(v), data_of(out)))
            for tensor, found in load_file(out).items():
                assert found.tobytes() == tuned[tensor].tobytes(), tensor
        assert written[0] == written[1], "numpy writes other bytes than the compiled kernels"
        print(call(folder, "--version", "-v", kernels=""), end="")


if __name__ == "__main__":
    main()
