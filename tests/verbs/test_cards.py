"""Cards: what is said of a vector, what is never said, and that a user's text survives."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from families import perturbed, save, toy
from huggingface_hub import ModelCard, RepoCard
from hypothesis import given, settings
from hypothesis import strategies as st

import skillvec
from skillvec.checkpoints.opening import open_tensors
from skillvec.errors import UsageError
from skillvec.vectors.provenance import read_merged
from skillvec.verbs.card_file import BEGIN, END
from skillvec.verbs.cards import hub_model, merged_card, renewed, vector_card

SHA, SHA2 = "1" * 40, "2" * 40
FILES = {"skill.safetensors": 1234567}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-place")
    base = toy(0, layers=12)
    save(folder / "base", base)
    save(folder / "tuned", perturbed(base, 1, density=0.25))
    skillvec.diff(
        folder / "tuned", folder / "base", folder / "skill.safetensors",
        method="GRPO", notes="on <b>my</b> | data", exclude=["lm_head.*"],
    )  # fmt: skip
    return folder


@pytest.fixture
def manifest(folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(skillvec.SkillVector.open(folder / "skill.safetensors").manifest))


def on_hub(manifest: dict[str, Any]) -> dict[str, Any]:
    manifest["base"] |= {"ref": "org/base@v1", "revision": SHA}
    manifest["tuned"] |= {
        "ref": f"/data/me/hub/models--org--tuned-x/snapshots/{SHA2}", "revision": SHA2,
    }  # fmt: skip
    return manifest


def made(manifest: dict[str, Any], existing: str | None = None, **options: Any) -> str:
    return vector_card(manifest, name="user/skill", files=FILES, existing=existing, **options)


def test_a_card_says_what_the_vector_is(manifest):
    text = made(on_hub(manifest))
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": ["org/base"],
        "library_name": "skillvec",
        "tags": ["skill-vector", "task-arithmetic", "grpo"],
        "base_model_relation": "adapter",
    }
    assert f"| base | `org/base@{SHA}` (toy; BF16;" in text
    assert f"| tuned | `org/tuned-x@{SHA2}`" in text
    assert f"skillvec diff org/tuned-x@{SHA2} org/base@{SHA} --dtype auto" in text
    assert "--exclude 'lm_head.*'" in text
    assert "skillvec apply TARGET user/skill -o OUT" in text
    assert "on &#60;b&#62;my&#60;/b&#62; &#124; data" in text
    assert "2601.11258" in text and "1,234,567 bytes" in text and "/data/me" not in text


def test_the_table_adds_up(manifest):
    rows = re.findall(r"^\| (\S.*?) \| (\d+) \| ([\d,]+) \| ([\d.]+)% \| (\S+) \| ([\d.]+)% \|$",
                      made(manifest), re.M)  # fmt: skip
    *groups, total = [(a, int(b), int(c.replace(",", "")), *map(float, d)) for a, b, c, *d in rows]
    assert [row[0] for row in groups if "layers" in row[0]][-1] == "`model.layers.10 to 11`"
    assert len(groups) == 6 + 2
    tensors = manifest["tensors"]
    assert sum(row[1] for row in groups) == total[1] == len(tensors)
    assert sum(row[2] for row in groups) == total[2]
    changed = sum(entry["changed"] for entry in tensors.values())
    assert total[3] == round(100 * changed / total[2], 2)
    assert sum(row[4] ** 2 for row in groups) == pytest.approx(total[4] ** 2, rel=1e-2)
    assert sum(row[5] for row in groups) == pytest.approx(100, abs=0.5)


def test_no_path_of_a_disk_is_said(manifest, folder):
    text = made(manifest)
    assert "secret-place" not in text and str(folder) not in text
    assert "| base | a local checkpoint" in text and "skillvec diff TUNED BASE" in text
    assert "base_model" not in text
    manifest["base"] |= {"ref": "runs/sft"}  # looks like a name on the Hub
    manifest["tuned"] |= {"ref": "../me@home/x"}
    assert "runs/sft" not in made(manifest) and "me@home" not in made(manifest)
    assert hub_model("runs/sft") is None and hub_model("/a/b", SHA) is None
    assert hub_model("hf://org/name@v1/a.safetensors") == ("org/name", "v1")
    both = [f"{folder}/skill.safetensors"] * 2
    combined = skillvec.combine(*both, weights=[0.5, -1], output=folder / "c.safetensors",
                                force=True)  # fmt: skip
    text = made(combined.manifest)
    assert "secret-place" not in text and "| vector | 0.5 * a local vector" in text
    assert "linear of vectors" in text


def test_a_vector_of_an_adapter_is_said_to_be_one(manifest):
    assert "restores tuned bit for bit, in the tensors and rows that were taken" in made(manifest)
    parent = {"ref": f"org/adapter@{SHA2}", "identity": "1" * 32, "manifest": None, "tuned": None,
              "base": f"org/base@{SHA}", "dtype": "auto", "include": [], "exclude": []}  # fmt: skip
    on_hub(manifest).update(tuned=None, recipe=None, parents=[parent])
    manifest["exactness"]["claim"] = "combined"
    text = made(manifest)
    assert f"| how | s B A of a LoRA adapter |\n| adapter | `org/adapter@{SHA2}` |" in text
    assert f"skillvec diff org/adapter@{SHA2} org/base@{SHA} --dtype auto" in text
    assert "operator" not in text and "of vectors" not in text
    manifest["parents"] = [parent | {"ref": "runs/adapter"}]
    assert "| adapter | a local adapter |" in made(manifest)
    assert f"skillvec diff ADAPTER org/base@{SHA}" in made(manifest)


def test_strings_of_a_header_do_no_harm(manifest):
    mark = f"{END}\n\n---\n# heading <mark>`|[x](y:1)\x1b[0m {BEGIN} -->"
    expected = made(manifest)
    manifest["training"] = {"method": mark, "notes": mark}
    manifest["base"]["model_type"] = manifest["tool"] = mark
    manifest["excluded"], manifest["exclude"] = [mark], [mark]
    manifest["tensors"][mark] = next(iter(manifest["tensors"].values()))
    text = vector_card(manifest, name="user/skill", files={mark: 1})
    assert text.count(BEGIN) == text.count(END) == 1 == expected.count(END)
    assert "\x1b" not in text
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    assert "<mark>" not in outside and "](y" not in outside
    assert not re.search("^# heading", text, re.M)
    assert renewed(text, text) == text


USERS = [
    "# Mine\n\ntext",
    "---\nlicense: mit  # keep\ntags: [a, b]\n\n# why\nmodel-index:\n- name: x\n---\n# Mine\n",
    "---\r\nlicense: mit\r\n---\r\n# Mine\r\n\r\ntext\r\n",
    "---\n{license: mit}\n---\nflow style\n",
    "---\n---\nno keys\n",
    "---\nlibrary_name:\n---\n",
]


@pytest.mark.parametrize("existing", USERS)
def test_what_a_user_wrote_stays(manifest, existing):
    fresh = made(on_hub(manifest), license={"license": "apache-2.0", "license_link": "x"})
    text = made(manifest, existing, license={"license": "apache-2.0", "license_link": "x"})
    theirs, ours = RepoCard(existing).data.to_dict(), ModelCard(fresh).data.to_dict()
    if "license" in theirs:
        ours = {key: value for key, value in ours.items() if "license" not in key}
    assert RepoCard(text).data.to_dict() == {**ours, **theirs}
    body = existing.rpartition("---")[2].lstrip("\r\n")
    assert body in text and text.index(body) < text.index(BEGIN)
    for line in ("license: mit  # keep\n", "# why\n", "tags: [a, b]\n"):
        assert (line in existing) == (line in text)
    assert ("\r\n" in existing) == ("\r\n" in text)
    assert "\r\n" not in existing or not re.search("(?<!\r)\n", text)
    # what was generated is renewed, and nothing else
    manifest["identity"], manifest["base"]["ref"] = "f" * 32, "org/new"
    again = made(manifest, text + "\nlast words", license={"license": "mit"})
    assert again.endswith("\nlast words") and body in again
    assert "f" * 32 in again and again.count(BEGIN) == 1
    assert RepoCard(again).data.base_model == ["org/new"]
    assert RepoCard(again).data.license == "mit"
    assert "license_link" not in again
    assert made(manifest, again, license={"license": "mit"}) == again


def test_a_generated_value_that_a_user_changed_is_theirs(manifest):
    text = made(on_hub(manifest)).replace("- grpo\n", "- grpo\n- fun\n")
    text = text.replace("base_model_relation: adapter\n", "base_model_relation: finetune\n")
    manifest["training"]["method"] = "dpo"
    data = ModelCard(made(manifest, text)).data
    assert data.tags == ["skill-vector", "task-arithmetic", "grpo", "fun"]
    assert data["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\na: [\n---\n", "cannot be read"),
        ("---\n- a\n---\n", "cannot be read"),
        ("---\n1: a\n---\n", "cannot be read"),
        (f"{BEGIN} -->\n", "enclose"),
        (f"{END}\n", "enclose"),
        (f"{END}{BEGIN} -->", "enclose"),
        (f"{BEGIN} -->{END}{BEGIN} -->{END}", "enclose"),
        (f"{BEGIN} mine -->{END}", "enclose"),
    ],
)
def test_what_cannot_be_understood_is_refused(manifest, text, message):
    with pytest.raises(UsageError, match=message):
        made(manifest, text)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=80))
@settings(max_examples=30)
def test_any_text_stays(text):
    card = f"---\nlicense: mit\n---\n\n{BEGIN} license={'0' * 12} -->\n# x\n\ny\n{END}\n"
    words = "w" + text.replace("<", "")
    kept = renewed(words, card)
    assert words in kept and kept.count(END) == 1
    assert words in renewed(kept, card)


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("my own terms", {"license": "other", "license_name": "my own terms"}),
        (None, {}),
    ],
)
def test_licences(manifest, license, expected):
    data = ModelCard(made(manifest | {"license": license})).data.to_dict()
    assert {key: value for key, value in data.items() if "license" in key} == expected
    inherited = ModelCard(made(manifest | {"license": license}, license={"license": "mit"}))
    assert inherited.data.license == expected.get("license", "mit")


def test_a_merged_model(folder):
    target = f"{folder}/base"
    report = skillvec.apply(
        target, folder / "skill.safetensors", folder / "out", lam=0.5, force=True, exclude=["lm_*"]
    )
    recipe = read_merged(open_tensors(folder / "out", "x"))
    theirs = "---\nlicense: mit\nlanguage: en\ntags: [chat]\n---\n# The target\n\nwords\n"
    text = merged_card(recipe, name="user/out", inherited=theirs, facts=report.facts)
    data = ModelCard(text).data.to_dict()
    assert data == {
        "language": "en", "license": "mit", "library_name": "transformers",
        "tags": ["skillvec", "merge", "task-arithmetic"],
    }  # fmt: skip
    assert text.endswith("# The target\n\nwords\n") and "secret-place" not in text
    assert "skillvec apply TARGET VECTOR --lam 0.5 --exclude 'lm_*' -o OUT" in text
    gain = re.search(r"realised gain \| ([\d.]+)", text)
    assert float(gain[1]) == pytest.approx(report.facts["gain"], abs=1e-3)
    where = {target: SHA, f"{folder}/skill.safetensors": SHA2}
    recipe["target"]["ref"], recipe["vector"]["ref"] = "org/target", "org/skill"
    where = {"org/target": SHA, "org/skill": SHA2}
    text = merged_card(recipe, name="user/out", revisions=where)
    data = ModelCard(text).data
    assert (data.base_model, data["base_model_relation"]) == (["org/target", "org/skill"], "merge")
    assert f"skillvec apply org/target@{SHA} org/skill@{SHA2} --lam 0.5" in text
    again = merged_card(recipe, name="user/again", inherited=text, revisions=where)
    assert again.count(BEGIN) == 1 and renewed(again, again) == again


def test_a_model_merged_of_several_vectors_names_their_weights(folder):
    between = skillvec.SkillVector.between(folder / "tuned", folder / "base")
    both = skillvec.combine(
        folder / "skill.safetensors", between, weights=[0.5, -0.25], op="ties",
        parameters={"density": 0.5},
    )  # fmt: skip
    skillvec.apply(folder / "base", both, folder / "both", exclude=["lm_*"], force=True)
    recipe = read_merged(open_tensors(folder / "both", "x"))
    recipe["vector"]["parts"][0]["ref"] = "org/skill"
    text = merged_card(recipe, name="user/out", revisions={"org/skill": SHA})
    assert f"| vector | 0.5 * `org/skill@{SHA}` |" in text
    assert "| combined by | ties, density 0.5 |" in text and "secret-place" not in text
    words = f"apply TARGET org/skill@{SHA}=0.5 TUNED::BASE=-0.25 --lam 1.0 --exclude 'lm_*'"
    assert f"skillvec {words} --op ties --param density=0.5 -o OUT" in text
    recipe["vector"]["recipe"]["vectors"][0]["rules"] = [{"match": "*", "weight": 0.0}]
    text = merged_card(recipe, name="user/out")
    assert "skillvec apply TARGET --lam 1.0 --exclude 'lm_*' --recipe RECIPE -o OUT" in text
