"""What every verb writes, byte for byte, as it was before: digests of all files of fixed commands.

`python tests/test_golden.py` writes tests/golden/verbs.json anew; a change of it is a change of the
bytes that users get, and has to be meant. The same file holds for both ways of computing: compiled
kernels and numpy alone. Sums in floating point and singular vectors may differ in their last digits
from one processor to another: reports are compared as JSON with a tolerance, factors by name only.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

import skillvec
from skillvec.cli.commands import main
from skillvec.engine import runner, threads
from skillvec.engine.plan import Plan
from skillvec.ops import compiled

EXPECTED = Path(__file__).parent / "golden" / "verbs.json"
MAKE = "python tests/test_golden.py"
DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (48, 16),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (40, 1024),
    "model.norm.weight": (16,),
    "lm_head.weight": (48, 16),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 32,
    "model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "vocab_size": 48,
}  # fmt: skip
COMMANDS = """
diff TUNED BASE -o auto.safetensors
diff TUNED BASE -o dense.safetensors --codec dense
diff TUNED BASE -o sparse.safetensors --codec sparse
diff TUNED BASE -o packed.safetensors --codec packed
diff FAR BASE -o far.safetensors --method grpo --notes "as asked" --license mit
diff TUNED BASE -o parts.safetensors --codec dense --max-shard-size 30KB
diff TUNED BASE -o as_bf16.safetensors --dtype bf16
diff TUNED BASE -o as_fp32.safetensors --dtype fp32
apply BASE auto.safetensors -o restored
apply TARGET far.safetensors -o near --lam 0.7
apply TARGET far.safetensors -o drawn --rounding stochastic --seed 3
apply TARGET --tuned TUNED --base BASE -o one_pass
verify one_pass --json
verify restored --json
verify auto.safetensors --json
"""
MORE = """
diff bf16_tuned fp32_base -o mixed.safetensors
diff fp32_tuned bf16_base -o mixed2.safetensors
diff tied_tuned tied_base -o tied.safetensors
apply tied_base tied.safetensors -o tied_out
diff bf16_tuned bf16_base -o chosen.safetensors --include *layers*
apply bf16_target bf16_auto.safetensors -o wide --dtype fp32
apply bf16_target bf16_auto.safetensors -o left_out --exclude *norm*
apply fp16_target/model.safetensors fp16_auto.safetensors -o file.safetensors
diff adapter bf16_base -o adapter.safetensors
apply bf16_target adapter -o with_adapter
combine bf16_auto.safetensors=0.7 bf16_far.safetensors=-0.3 -o linear.safetensors
combine bf16_auto.safetensors bf16_far.safetensors --op ties --param density=0.3 -o ties.safetensors
combine bf16_auto.safetensors bf16_far.safetensors --op dare_linear --seed 4 -o dare.safetensors
combine --recipe recipe.yaml -o recipe.safetensors
combine fp32_auto.safetensors fp16_auto.safetensors -o of_two_dtypes.safetensors
apply bf16_target ties.safetensors -o with_ties
verify with_ties --json
verify ties.safetensors --json
combine bf16_auto.safetensors bf16_far.safetensors --op dare_ties -o dare_ties.safetensors
combine bf16_auto.safetensors bf16_far.safetensors --op della -o della.safetensors
combine bf16_auto.safetensors bf16_far.safetensors --op breadcrumbs -o breadcrumbs.safetensors
combine bf16_auto.safetensors bf16_far.safetensors --op ram -o ram.safetensors
combine bf16_auto.safetensors bf16_far.safetensors --op sparsify -o sparsify.safetensors
combine bf16_auto.safetensors bf16_far.safetensors --dtype bf16 --codec sparse -o short.safetensors
combine bf16_auto.safetensors bf16_far.safetensors --max-shard-size 30KB -o parts.safetensors
combine bf16_auto.safetensors --codec sparse -o again.safetensors
diff fp8_tuned fp8_base -o fp8.safetensors
apply bf16_target fp8.safetensors -o with_fp8
apply bf16_target bf16_auto.safetensors=0.5 bf16_far.safetensors --op ties -o of_two
apply bf16_target --recipe recipe.yaml -o by_recipe
export-patch bf16_auto.safetensors -o flush.safetensors --form verl
export-patch bf16_auto.safetensors -o told.safetensors --form vllm
export-patch bf16_auto.safetensors -o patch.safetensors
import-patch patch.safetensors bf16_base -o of_patch.safetensors
extract-lora bf16_far.safetensors -o lora --rank 4 --exclude *layers.1*
orthogonality bf16_auto.safetensors bf16_far.safetensors --against bf16_base -o angles
orthogonality bf16_far.safetensors fp32_auto.safetensors --control random -o nulls
norms bf16_auto.safetensors -o norms
inspect bf16_auto.safetensors --json
inspect bf16_base --json
inspect bf16_auto.safetensors --target bf16_target --json
"""
RECIPE = """
op: linear
vectors:
  - vector: bf16_auto.safetensors
    weight: 0.5
    rules: [{match: "*norm*", weight: 0}]
  - vector: bf16_far.safetensors
    rules: [{match: "*.layers.*", weight: [0.2, 0.8]}]
"""


# ---------------------------------------------------------------------------------- fixed inputs


def made(folder: str, dtype: torch.dtype, seed: int, *, base: Any = None, size: float = 1e-3,
         share: float = 1.0, shards: int = 1, tied: bool = False) -> dict[str, Any]:  # fmt: skip
    """Write a model of uniform numbers, or one `size` away from `base` in `share` of its values."""
    draw = np.random.Generator(np.random.PCG64(seed))
    values = {}
    for name, shape in SHAPES.items():
        if tied and name == "lm_head.weight":
            continue
        drawn = draw.random(shape) - 0.5
        kept = draw.random(shape) < share
        values[name] = drawn * 0.1 if base is None else base[name] + drawn * size * kept
    tensors = {name: torch.from_numpy(value).to(dtype) for name, value in values.items()}
    tensors["position_ids"] = torch.arange(10).reshape(1, 10)
    path = Path(folder)
    path.mkdir()
    config = CONFIG | {"tie_word_embeddings": tied}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return values
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
              for i, name in enumerate(tensors)}  # fmt: skip
    for file in sorted(set(places.values())):
        part = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(part, path / file, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return values


def made_fp8(folder: str, seed: int) -> None:
    """Write a model whose matrices are blocks of 8-bit numbers, with a scale for each."""
    draw = np.random.Generator(np.random.PCG64(seed))
    tensors = {}
    for name, shape in SHAPES.items():
        values = torch.from_numpy(draw.random(shape) - 0.5)
        if "layers" not in name:
            tensors[name] = values.bfloat16()
            continue
        tensors[name] = (values * 800).to(torch.float8_e4m3fn)
        blocks = [-(-side // 128) for side in shape]
        tensors[f"{name}_scale_inv"] = torch.from_numpy(draw.random(blocks) + 1).float() * 1e-4
    Path(folder).mkdir()
    save_file(tensors, Path(folder, "model.safetensors"), {"format": "pt"})
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = CONFIG | {"tie_word_embeddings": False, "quantization_config": quantised}
    Path(folder, "config.json").write_text(json.dumps(config, indent=2))


def make_inputs() -> None:
    for name, dtype in DTYPES.items():
        base = made(f"{name}_base", dtype, 1, shards=2 if name == "bf16" else 1)
        made(f"{name}_tuned", dtype, 2, base=base, size=2e-3, share=0.3)
        made(f"{name}_far", dtype, 3, base=base, size=0.1)
        made(f"{name}_target", dtype, 4, base=base, size=1e-2, shards=2 if name == "bf16" else 1)
    base = made("tied_base", torch.bfloat16, 1, tied=True)
    made("tied_tuned", torch.bfloat16, 2, base=base, tied=True)
    for name, seed in (("fp8_base", 1), ("fp8_tuned", 2)):
        made_fp8(name, seed)
    draw = np.random.Generator(np.random.PCG64(7))
    factors = {}
    for module, (rows, columns) in {"mlp.up_proj": (32, 16), "self_attn.q_proj": (16, 16)}.items():
        for factor, shape in (("A", (4, columns)), ("B", (rows, 4))):
            values = torch.from_numpy(draw.random(shape) - 0.5).float()
            factors[f"base_model.model.model.layers.0.{module}.lora_{factor}.weight"] = values
    Path("adapter").mkdir()
    save_file(factors, "adapter/adapter_model.safetensors", {"format": "pt"})
    Path("adapter/adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"],
        "base_model_name_or_path": "", "fan_in_fan_out": False,
    }))  # fmt: skip
    Path("recipe.yaml").write_text(RECIPE)


# outputs of COMMANDS: what is made from each dtype has a name of its own
OUTPUTS = (r"\b(?:auto|dense|sparse|packed|far|parts|as_bf16|as_fp32)\.safetensors"
           r"|\b(?:restored|near|drawn|one_pass)(?= |$)")  # fmt: skip


def commands() -> Iterator[str]:
    for dtype in DTYPES:
        lines = re.sub(OUTPUTS, rf"{dtype}_\g<0>", COMMANDS, flags=re.MULTILINE)
        for role in ("TUNED", "BASE", "FAR", "TARGET"):
            lines = re.sub(rf"\b{role}\b", f"{dtype}_{role.lower()}", lines)
        yield from lines.strip().splitlines()
    yield from MORE.strip().splitlines()


# ------------------------------------------------------------------------------------ what is seen


def neutral(content: bytes) -> bytes:
    """Take out what is of this machine, this version and this moment, and keep the length."""
    here = os.getcwd().encode()
    content = content.replace(here, b"HERE")
    content = content.replace(f"skillvec {skillvec.__version__}".encode(), b"skillvec VERSION")
    return re.sub(rb'(?<=")(avx512|avx2|neon|numpy)(?=")', b"KERNELS", content)


def without(found: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(found, dict):
        return {key: without(value, keys) for key, value in found.items() if key not in keys}
    return [without(value, keys) for value in found] if isinstance(found, list) else found


OF_THE_MACHINE = ("workers", "memory_nbytes", "kernels", "free_nbytes", "seconds", "threads")


def thinned(found: Any) -> Any:
    """Keep the first of many rows, and how many there are: one row shows all keys."""
    if isinstance(found, dict):
        return {key: thinned(value) for key, value in found.items()}
    if isinstance(found, list) and len(found) > 1 and isinstance(found[0], dict | list):
        return [thinned(found[0]), f"{len(found)} in all"]
    return [thinned(value) for value in found] if isinstance(found, list) else found


def seen(path: Path) -> Any:
    """Return a digest of one written file, or what it says where digits may differ."""
    content = path.read_bytes()
    if path.name == "report.json":
        return thinned(without(json.loads(neutral(content)), OF_THE_MACHINE))
    if path.name == "report.csv":
        rows = [*csv.reader(io.StringIO(content.decode()))]
        return [rows[0], [number(cell) for cell in rows[1]], f"{len(rows)} in all"]
    if path.name == "report.html":  # its numbers are those of report.json
        return sorted(set(re.findall(r'(?:id|class)="[\w -]+"', content.decode())))
    if path.parent.name == "lora" and path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    if path.parent.name == "lora":
        return re.sub(r"\d+\.\d+", "N", neutral(content).decode())
    return hashlib.sha256(neutral(content)).hexdigest()


class Stopped(Exception):  # noqa: N818
    """As a killed process, but for the process."""


def journals() -> Iterator[tuple[str, Any]]:
    """Stop two runs at their fourth tensor and yield what they leave, a name and what is seen."""

    def stop(plan: Plan, number: int, *rest: Any) -> None:
        if number == 3:
            raise Stopped

    for words in (
        "diff bf16_tuned bf16_base -o cut.safetensors --engine serial --codec sparse",
        "apply bf16_target bf16_auto.safetensors -o cut --lam 0.7 --engine serial",
    ):
        with threads.on_block(stop):
            result = CliRunner().invoke(main, shlex.split(words))
        assert isinstance(result.exception, Stopped), (words, result.output)
    for folder in (".cut.safetensors", ".cut"):
        left = Path(f"{folder}.skillvec-unfinished")
        for path in sorted(left.rglob("*")):
            if path.name == "journal":
                yield str(path), [journal_line(line) for line in path.read_bytes().splitlines()]
            elif path.is_file() and path.name != "owner":  # who is at work, since when
                yield str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def journal_line(line: bytes) -> Any:
    """Return what a line says, without its checksum and the times of the inputs."""
    said = json.loads(neutral(line.split(b" ", 1)[1]))
    for facts in said.get("inputs", {}).values():
        del facts[1]
    return said


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def run_all() -> dict[str, Any]:
    """Run every command in the current, empty folder, and return what is seen afterwards."""
    make_inputs()
    before = {path for path in Path().rglob("*") if path.is_file()}
    found: dict[str, Any] = {}
    for line in commands():
        words = shlex.split(line)
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (line, result.output[-500:], result.exception)
        if "--json" in words:
            said = json.loads(neutral(result.stdout.encode()))
            found[line] = thinned(without(said, OF_THE_MACHINE))
    for path in sorted(Path().rglob("*")):
        if path.is_file() and path not in before:
            found[str(path)] = seen(path)
    return found | dict(journals())


# what products of fp32 matrices decide, which BLAS rounds as the processor's kernels do
BY_BLAS = ("z_rotation", "z", "p", "cosine_sd")


def same(found: Any, expected: Any, digits: int = 9) -> bool:
    """Say whether both are the same, with the same order of keys; floats to so many digits."""
    if isinstance(expected, float) or isinstance(found, float):
        numbers = all(isinstance(value, float | int) for value in (found, expected))
        return numbers and math.isclose(found, expected, rel_tol=10.0**-digits, abs_tol=1e-12)
    if isinstance(expected, dict) and isinstance(found, dict):
        return [*found] == [*expected] and all(
            same(found[key], expected[key], 6 if key in BY_BLAS else digits) for key in found
        )
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(
            same(*both, digits) for both in zip(found, expected, strict=True)
        )
    return type(found) is type(expected) and found == expected


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have numpy do what kernels do: what is kept of them is forgotten while the test runs."""
    monkeypatch.setattr(compiled, "_chosen", lambda: compiled._Choice("numpy", {}, "a test"))
    for name in [name for name in sys.modules if name.startswith("skillvec.ops.")]:
        for key, value in list(vars(sys.modules[name]).items()):
            if hasattr(value, "cache_clear") and key.endswith(("_kernel", "_kernels")):
                monkeypatch.setattr(sys.modules[name], key, cache(value.__wrapped__))


@pytest.mark.parametrize("way", ["compiled kernels", "numpy alone"])
def test_what_the_verbs_write_is_what_they_wrote(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "numpy alone":
        alone(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 0.0)  # a line of the journal for each block
    found = json.loads(json.dumps(run_all()))
    expected = json.loads(EXPECTED.read_text())
    assert [*found] == [*expected]
    differ = [key for key in expected if not same(found[key], expected[key])]
    assert not differ, f"run `{MAKE}` if the bytes are meant to be others: {differ}"


def test_a_difference_is_seen() -> None:
    row = {"a": 1.0, "b": [1, "x"]}
    assert same(row, {"a": 1.0 + 1e-12, "b": [1, "x"]})
    others: list[Callable[[], Any]] = [
        lambda: {"a": 1.00001, "b": [1, "x"]},
        lambda: {"b": [1, "x"], "a": 1.0},
        lambda: {"a": 1.0, "b": [1, "y"]},
        lambda: {"a": 1.0, "b": [1]},
        lambda: {"a": 1.0, "b": [True, "x"]},
    ]
    assert not any(same(row, other()) for other in others)


if __name__ == "__main__":
    import tempfile

    target = EXPECTED.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        runner.CLAIM_SECONDS = 0.0
        content = run_all()
        os.chdir(target.parent)
    target.write_text(json.dumps(content, indent=0, sort_keys=False) + "\n")
    print(f"wrote {target.name}: {len(content)} entries", file=sys.stderr)
