"""The file of a seed: what it holds, what it names, what several say together."""

import json
from pathlib import Path

import pytest
from real_seeds import EACH, LAMBDAS, LAYERS, SUBJECTS, make_seed

from skillvec.analysis.differences import difference
from skillvec.recipes.claims.results import find_pair, find_row
from skillvec.recipes.real.results import (
    count_completions,
    gather,
    partial_scores,
    read_seeds,
    write_seed,
)
from skillvec.trials.scores import score_of


def test_a_seed_is_written_whole_and_small(tmp_path: Path) -> None:
    line = make_seed(tmp_path / "seed-3", 3)
    file = tmp_path / "docs" / "real" / "seed-3.json"
    assert write_seed(line, 3, {"model": "SmolLM2-135M-Instruct", "subjects": 25}, file) == []
    assert [*file.parent.iterdir()] == [file] and file.stat().st_size < 200_000
    text = file.read_text()
    assert str(tmp_path) not in text and "/elsewhere" not in text
    (seed,) = read_seeds([file])
    assert seed["settings"]["subjects"] == 25 and seed["unfinished"] == []
    assert {"skillvec", "torch", "transformers", "trl"} == {*seed["versions"]}
    assert seed["machine"]["processors"] >= 1
    assert seed["trainings"]["people/rl_t"] == {
        "max_steps": 40, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-5,
    }  # fmt: skip
    assert count_completions(seed["trainings"]["people/rl_t"]) == 40 * 32
    assert count_completions({"max_steps": 3, "global_batch": 64}) == 192
    arms = seed["scores"]["people"]["arms"]
    assert {*arms["lambda 1"]["marks"]} == {"exact", "contains"}
    assert arms["lambda 1"]["stage"] == "people/asked"
    asked = seed["commands"]["people/asked"]
    assert "--model OUT/people/sft_t --arms" in asked
    assert "'lambda 1=1*OUT/people/round-1/skill.safetensors'" in asked
    assert {*arms["lambda 1"]["means"]} == {"exact", "contains", "f1"}
    assert seed["scores"]["people"]["groups"][:2] == [["people T 0", EACH], ["people T 1", EACH]]
    assert "groups" not in arms["lambda 1"]
    assert arms["RL on S"]["groups"][0] == ["people S 0", EACH]


@pytest.mark.parametrize("name", ["a run", "a+b", "K=2", "x*y"])
def test_commands_hold_no_folder_whatever_it_is_called(name: str, tmp_path: Path) -> None:
    plain = make_seed(tmp_path / "plain" / "seed-0", 0)
    line = make_seed(tmp_path / name / "seed-0", 0)
    files = [tmp_path / f"{n}.json" for n in range(2)]
    for made, file in zip((plain, line), files, strict=True):
        write_seed(made, 0, {}, file)
    one, other = (json.loads(file.read_text())["commands"] for file in files)
    assert one == other


def test_marks_come_back_as_they_were_asked(tmp_path: Path) -> None:
    line = make_seed(tmp_path / "seed-0", 0)
    write_seed(line, 0, {}, tmp_path / "seed-0.json")
    found = gather(read_seeds([tmp_path / "seed-0.json"]))
    said = {}
    for arm in ("lambda 1", "SFT only"):
        answers = json.loads(line.scores["tools", arm].read_text())["answers"]
        said[arm] = score_of((a["exact"] for a in answers), (a["group"] for a in answers))
        assert found.exact("tools", arm).values == (said[arm].mean,)
    gap = found.exact("tools", "lambda 1") - found.exact("tools", "SFT only")
    right = difference(said["lambda 1"], said["SFT only"])
    (own,) = gap.within()
    assert own.degrees == SUBJECTS - 1
    assert (own.mean, own.low, own.high) == pytest.approx((right.mean, right.low, right.high))
    assert found.lambdas == LAMBDAS and found.domains == ("people", "tools")
    (alone,) = found.probe("people", "SFT only", "told").within()
    assert alone.standard_error is None


def test_angles_keep_what_claims_and_figures_read(tmp_path: Path) -> None:
    line = make_seed(tmp_path / "seed-0", 0)
    write_seed(line, 0, {}, tmp_path / "seed-0.json")
    found = gather(read_seeds([tmp_path / "seed-0.json"]))
    whole = json.loads((line.out / "angles" / "report.json").read_text())
    names = "people/round-1/skill", "people/sft_t"
    kept, full = (find_pair(report, *names) for report in (found.angles[0], whole))
    for part in ("overall", "layers"):
        for key, value in find_row(kept, part).items():
            right = find_row(full, part)[key]
            assert value == (right if key == "name" else pytest.approx(right, rel=1e-6))
    assert [row["name"] for row in kept["layers"]] == [row["name"] for row in full["layers"]]
    assert [row["name"] for row in kept["tensors"]] == [row["name"] for row in full["tensors"]]
    for row, other in zip(kept["tensors"], full["tensors"], strict=True):
        assert row["cosine"] == pytest.approx(other["cosine"], rel=1e-3)
    assert len(kept["layers"]) == LAYERS
    assert find_pair(found.angles[0], names[0], "tools/sft_t")["layers"] == []
    own = find_pair(found.angles[0], "tools/round-1/skill", "tools/sft_t")
    assert len(own["layers"]) == LAYERS and own["tensors"] == []
    copy = find_pair(found.copies["tools"][0], "tools/round-1/skill", "copies/bf16")
    assert copy["overall"]["density_b"] == 0.22


def test_a_stage_that_is_not_done_is_named_and_what_it_would_say_is_missing(tmp_path: Path) -> None:
    def skip(name: str) -> bool:
        return name in ("people/asked-K_=_2", "people/rl_t", "angles")

    files = [tmp_path / f"seed-{seed}.json" for seed in (4, 2)]
    assert write_seed(make_seed(tmp_path / "4", 4), 4, {}, files[0]) == []
    line = make_seed(tmp_path / "2", 2, skip)
    unfinished = write_seed(line, 2, {}, files[1])
    assert unfinished == ["people/rl_t", "people/asked-K_=_2", "angles"]
    seeds = read_seeds(files)
    assert [seed["seed"] for seed in seeds] == [2, 4]
    assert seeds[0]["unfinished"] == unfinished and seeds[0]["angles"] is None
    found = gather(seeds)
    assert found.seeds == (2, 4) and found.angles == []
    assert "people/rl_t" not in found.seconds and "people/sft_t" in found.seconds
    assert found.where("K = 2") == () and found.where("lambda 1") == ("people", "tools")
    assert len(found.exact("tools", "lambda 1").values) == 2
    assert partial_scores(seeds) == {("people", "K = 2"): [2]}
    assert len(gather(seeds[1:]).angles) == 1 and partial_scores(seeds[1:]) == {}
    # what was not asked for is not missed, and is written where it is there
    missed = write_seed(line, 2, {}, files[1], {"angles"})
    assert missed == ["angles"]
    assert "people/sft_t" in json.loads(files[1].read_text())["seconds"]


def test_files_that_are_no_seeds_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "seed-0.json"
    write_seed(make_seed(tmp_path / "0", 0), 0, {}, file)
    with pytest.raises(ValueError, match="different seeds, found none"):
        read_seeds([])
    with pytest.raises(ValueError, match=r"different seeds, found \[0, 0\]"):
        read_seeds([file, file])
    (tmp_path / "other.json").write_text('{"schema": 9}')
    with pytest.raises(ValueError, match=r"other\.json: expected a seed of schema 1"):
        read_seeds([tmp_path / "other.json"])
    (tmp_path / "cut.json").write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match=r"cut\.json: not JSON"):
        read_seeds([tmp_path / "cut.json"])
    whole = json.loads(file.read_text())
    (tmp_path / "other.json").write_text(json.dumps(whole | {"seed": "0"}))
    with pytest.raises(ValueError, match=r"other\.json: expected a seed of schema 1"):
        read_seeds([tmp_path / "other.json"])
    for key, value in (("scores", None), ("commands", []), ("regimes", 1)):
        with pytest.raises(ValueError, match=f"^seed 0: expected {key} as write_seed makes it"):
            gather([whole | {key: value}])
