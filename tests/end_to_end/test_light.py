"""The light install: what runs without torch, transformers and scipy, and what the rest says."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import assert_same_bits, load, perturbed, save, toy
from hubserver import HubServer

from skillvec import errors

ROOT = Path(__file__).parents[2]
MISSING = {
    "torch", "transformers", "scipy", "gguf", "vl_convert", "ray", "s3fs", "gcsfs", "peft", "trl",
    "accelerate", "datasets", "openai",
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 24,
    "intermediate_size": 48, "vocab_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
HEAD = "lm_head.weight"
RUNS = """
diff tuned base -o v.safetensors
diff sft base -o w.safetensors --codec dense
diff tied_tuned tied_base -o tied.safetensors
diff tied_tuned stored_base -o stored.safetensors
apply base v.safetensors -o out
apply sft v.safetensors -o moved --lam 0.5
apply base --tuned tuned --base base -o fly
apply tied_base tied.safetensors -o tied_out
apply stored_base tied.safetensors -o stored_out
apply base adapter -o adapted
combine v.safetensors=0.7 w.safetensors=-0.3 --op ties -o c.safetensors
verify v.safetensors
verify c.safetensors
verify out
inspect base
inspect v.safetensors --target sft
norms v.safetensors
orthogonality v.safetensors w.safetensors
export-patch v.safetensors -o p.safetensors
import-patch p.safetensors base -o again.safetensors
push v.safetensors user/skill
pull user/skill -o pulled.safetensors
"""
REFUSED = {
    "extract-lora v.safetensors --rank 2 -o lora": "hf",
    "diff fused split -o f.safetensors": "hf",
    "orthogonality v.safetensors w.safetensors --subspace 2": "torch",
    "norms v.safetensors -o report": "report",
    "diff tuned base -o r.safetensors --engine ray": "ray",
    "inspect model.gguf": "gguf",
    "inspect s3://bucket/model": "s3",
    "inspect gs://bucket/model": "gcs",
}
UNKNOWN = "inspect untold"  # only a class of transformers knows whether it ties its head


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """What the command lines read."""
    base = toy(0)
    for name, tensors in (("base", base), ("tuned", perturbed(base, 1, density=0.3)),
                          ("sft", perturbed(base, 2))):  # fmt: skip
        save(tmp_path / name, tensors, config=CONFIG | {"tie_word_embeddings": False})
        rest = {key: tensor for key, tensor in tensors.items() if key != HEAD}
        save(tmp_path / f"tied_{name}", rest, config=CONFIG | {"tie_word_embeddings": True})
        rest[HEAD] = rest["model.embed_tokens.weight"].clone()
        save(tmp_path / f"stored_{name}", rest, config=CONFIG | {"tie_word_embeddings": True})
    untold = {key: tensor for key, tensor in base.items() if key != HEAD}
    save(tmp_path / "untold", untold, config=CONFIG)
    place = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    factors = {place.format("A"): torch.ones(2, 24), place.format("B"): torch.ones(24, 2)}
    save(tmp_path / "adapter" / "adapter_model.safetensors", factors)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    experts, moe = "model.layers.0.mlp.experts", {"model_type": "qwen3_moe"}
    parts = {"gate": (4, 6), "up": (4, 6), "down": (6, 4)}
    split = {f"{experts}.{i}.{part}_proj.weight": torch.ones(shape)
             for i in range(2) for part, shape in parts.items()}  # fmt: skip
    fused = {"gate_up_proj": (2, 8, 6), "down_proj": (2, 6, 4)}
    save(tmp_path / "split", split, config=moe)
    whole = {f"{experts}.{name}": torch.ones(shape) for name, shape in fused.items()}
    save(tmp_path / "fused", whole, config=moe)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    return tmp_path


def run_light(
    python: str, models: Path, server: HubServer, missing: set[str]
) -> tuple[dict[str, tuple[int, str]], str, list[str]]:
    """Run all command lines in one process; return exit codes and texts, and what came in."""
    lines = [*RUNS.strip().splitlines(), *REFUSED, UNKNOWN]
    path = [str(ROOT)] if missing else []
    environment = server.environment(models / "home") | {"PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [python, ROOT / "tests" / "support" / "light_install.py", *sorted(missing)],
        input="\n".join(lines), cwd=models, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results, callback, imported = json.loads(done.stdout)
    return dict(zip(lines, results, strict=True)), callback, imported


def check_light(results: dict[str, Any], callback: str, models: Path) -> None:
    for line in RUNS.strip().splitlines():
        code, said = results[line]
        assert code == 0, f"{line}\n{said}"
    for made, wanted in (("out", "tuned"), ("fly", "tuned"), ("tied_out", "tied_tuned"),
                         ("stored_out", "stored_tuned")):  # fmt: skip
        assert_same_bits(load(models / made), load(models / wanted))
    assert (models / "pulled.safetensors").read_bytes() == (models / "v.safetensors").read_bytes()
    for line, extra in REFUSED.items():
        code, said = results[line]
        assert code == 2 and f'pip install "skillvec[{extra}]"' in said, f"{line}\n{said}"
        assert "Traceback" not in said
    code, said = results[UNKNOWN]
    assert code == 0 and "unknown" in said and 'pip install "skillvec[hf]"' in said
    assert "SkillVectorCallback needs transformers, which is not installed" in callback


def test_the_light_install_runs_its_verbs_and_names_the_extras(models: Path, server: HubServer):
    results, callback, imported = run_light(sys.executable, models, server, MISSING)
    check_light(results, callback, models)
    assert imported == []


@pytest.mark.slow
def test_a_light_environment_runs_its_verbs(models: Path, server: HubServer):
    """What pip installs of the package alone."""
    made = models / "venv"
    subprocess.run([sys.executable, "-m", "venv", made], check=True)
    python = str(made / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", "."]
    subprocess.run(install, cwd=ROOT, check=True)
    tops = {path.name for path in made.glob("lib/*/site-packages/*")}
    assert "skillvec" in tops and not tops & MISSING
    check_light(*run_light(python, models, server, set())[:2], models)


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*errors.EXTRAS, "all", "browser", "dev", "docs"} == set(
        project["optional-dependencies"]
    )
    core = {line.partition(">")[0] for line in project["dependencies"]}
    assert not core & {"torch", "transformers", "scipy"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            "it needs x, which is not installed",
        ),
        (ModuleNotFoundError("no y", name="x.y"), "it needs x, which cannot be"),
        (ImportError("too old", name="x.y"), r"it needs x, which cannot be imported \(too old\)"),
        (ImportError("get it"), r"it needs the extra hf, which cannot be imported \(get it\)"),
    ],
)
def test_what_is_missing_is_named_with_its_command(error: ImportError, said: str) -> None:
    command = r': pip install "skillvec\[hf\]"$'
    with (
        pytest.raises(errors.UsageError, match=f"{said}.*{command}"),
        errors.needs("hf", "it"),
    ):
        raise error
    with pytest.raises(errors.UsageError, match=r"install adlfs$"), errors.needs("adlfs", "x"):
        raise error
