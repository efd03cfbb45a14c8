"""What a verb imports and starts: on a small model that is most of its time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rooms

# of other packages, and of Python what brings many files along or compiles much
HEAVY = {
    "scipy", "torch", "transformers", "huggingface_hub", "fsspec", "yaml", "jinja2", "vl_convert",
    "rich", "threadpoolctl", "asyncio", "concurrent", "csv", "fractions", "http", "logging",
    "importlib.metadata", "importlib.resources", "pickletools", "socket", "ssl", "statistics",
    "tempfile", "zipfile",
}  # fmt: skip
# of this package, what the verbs below have no use for
IDLE = {
    "checkpoints.gguf", "checkpoints.lora", "engine.ray_cluster", "engine.streaming", "remote.hub",
    "analysis.figures", "analysis.page", "remote.object_store", "vectors.adapted", "verbs._publish",
    "cli.versions",
}  # fmt: skip
RUN = """
import json, os, sys, time
from skillvec.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code in (0, None), end.code
tasks, tries, threads = "/proc/self/task", 500, 1
while os.path.isdir(tasks) and (threads := len(os.listdir(tasks))) > 1 and tries:
    tries -= 1  # those of the engine have ended, and the system may be slow to say so
    time.sleep(0.01)
print(json.dumps([threads, *sys.modules]))
"""


def run(*words: str | Path) -> tuple[int, set[str]]:
    """Run a command in a process of its own; return its threads at the end and its modules."""
    asked = {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "COVERAGE_PROCESS_START"}
    env = {key: value for key, value in os.environ.items() if key not in asked}
    argv = [sys.executable, "-c", RUN, *map(str, words), "-q"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    threads, *modules = json.loads(done.stdout.splitlines()[-1])
    return threads, set(modules)


@pytest.fixture(scope="module")
def made(family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str | Path]]:
    """Return a command line of each verb that has to start quickly, in an order that works."""
    folder = tmp_path_factory.mktemp("startup")
    vector = folder / "v.safetensors"
    return {
        "diff": ["diff", family.tuned, family.base, "-o", vector],
        "apply": ["apply", family.target, vector, "-o", folder / "out"],
        "verify": ["verify", folder / "out"],
        "inspect": ["inspect", vector, "--target", family.target],
        "orthogonality": ["orthogonality", vector, f"{family.sft}::{family.base}"],
        "combine": ["combine", f"{vector}=0.5", f"{vector}=0.25", "-o", folder / "c.safetensors"],
    }


def test_verbs_import_and_start_no_more_than_they_use(made):
    assert {*rooms.paths()} >= IDLE
    for verb, words in made.items():
        threads, modules = run(*words)
        assert f"skillvec.verbs._{verb}" in modules  # that is what was run
        idle = {f"skillvec.{name}" for name in IDLE}
        pool = {"concurrent", "logging"} if verb == "orthogonality" else set()  # its second pass
        assert not modules & (HEAVY | idle) - pool, verb
        assert threads == 1, f"{verb}: BLAS, or the engine, left {threads - 1} threads"


def test_what_is_heavy_is_seen(family, tmp_path: Path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"vectors:\n  - vector: {family.tuned}::{family.base}\n    weight: 0.5\n")
    _, modules = run("combine", "--recipe", recipe, "-o", tmp_path / "c.safetensors")
    assert modules & HEAVY == {"yaml"} and not modules & {f"skillvec.{name}" for name in IDLE}
