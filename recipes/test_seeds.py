"""Seeds side by side, each in a process of its own."""

from pathlib import Path

import pytest

from skillvec.recipes.seeds import run_seeds
from skillvec.recipes.stages import Pipeline


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Write a module `one_seed` that a new process finds."""
    (folder / "one_seed.py").write_text(f"import os, sys\n{body}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_every_seed_runs_with_its_share_of_the_cores_and_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_module(tmp_path, monkeypatch, "print(sys.argv[1:], os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setattr("os.cpu_count", lambda: 6)

    def plan(seed: int) -> Pipeline:
        line = Pipeline(tmp_path / f"seed-{seed}", "base")
        line.sft("model", "base", [{}], ["texts.jsonl"])
        return line

    run_seeds(plan, [4, 5], ["one_seed", "--out", "here"], jobs=2)
    for seed in (4, 5):
        log = (tmp_path / f"seed-{seed}" / "log.txt").read_text()
        assert log == f"['--out', 'here', '--one', '{seed}'] 3\n"
    assert "0%" in capsys.readouterr().out


def test_a_seed_that_fails_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, monkeypatch, "sys.exit('no space left')")
    with pytest.raises(ValueError, match=r"seed 1 failed.*\n.*no space left"):
        run_seeds(lambda seed: Pipeline(tmp_path / f"seed-{seed}", "base"), [1], ["one_seed"], 1)


@pytest.mark.parametrize(("seeds", "jobs"), [([0, 1, 0], 2), ([0], 0)])
def test_a_seed_runs_once_and_some_seed_runs(seeds: list[int], jobs: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each once, and at least one job"):
        run_seeds(lambda seed: Pipeline(tmp_path / f"seed-{seed}", "base"), seeds, ["x"], jobs)
    assert not [*tmp_path.iterdir()]
