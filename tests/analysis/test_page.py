"""The page of orthogonality and norms, and the figures of a report: what they hold, in what order.

tests/analysis/test_browser.py opens the same pages in a browser.
"""

import random
import re
import sys
import xml.etree.ElementTree as ET
from itertools import combinations, islice
from math import inf, nan, sqrt
from typing import Any

import pytest
from webpage import Parsed, check_stands_alone, check_structure

from skillvec.analysis import angle_page, charts, page
from skillvec.analysis.figures import draw_figures
from skillvec.analysis.statistics_table import write_spread
from skillvec.errors import UsageError

Row = dict[str, Any]

HOSTILE = "</script><mark title=x>{{vega}}"  # markup that does nothing but show itself

KINDS = (
    "input_layernorm.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "post_attention_layernorm.weight", "self_attn.k_norm.weight", "self_attn.k_proj.weight",
    "self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.q_proj.weight",
    "self_attn.v_proj.weight",
)  # fmt: skip
OUTSIDE = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")
STEP_EDGES = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
SUBSPACE = ("overlap_left", "overlap_right", "overlap_chance", "a_in_b", "b_in_a", "in_chance")


def tensors_of(layers: int) -> list[Row]:
    """Return names as of a Llama: `layers` times eleven, and three outside of the layers."""
    inside = [
        {"name": f"model.layers.{i}.{kind}", "layer": f"model.layers.{i}", "kind": kind}
        for i in range(layers)
        for kind in KINDS
    ]
    rows = inside + [{"name": name, "layer": "", "kind": name} for name in OUTSIDE]
    for row in rows:
        row["module"] = row["kind"].split(".")[0]
        row["numel"] = 4096 if "norm" in row["name"] else 4096 * 1024
    return rows


def vector_row(draw: random.Random, head: Row, rms: float, subspace: bool) -> Row:
    steps = [draw.randrange(0, 9) * 40 for _ in range(len(STEP_EDGES) + 1)]
    row = head | {
        "norm": rms * sqrt(head["numel"]), "rms": rms, "energy_share": draw.random() / 50,
        "density": draw.uniform(0.05, 0.3), "steps": steps, "below_half_step": 0.12,
        "kept_gain": 0.97, "kept_cosine": 0.95, "absorbed": 0.1,
    }  # fmt: skip
    ranks = {"stable_rank": 31.2, "effective_rank": 812.0, "top_energy": 0.21, "energy_in_w": 2e-4}
    return row | {key: value if subspace else None for key, value in ranks.items()}


def pair_row(draw: random.Random, head: Row, centre: float, subspace: bool) -> Row:
    scale = 1 / sqrt(head["numel"])
    cosine, control = draw.gauss(centre, 1.4) * scale, draw.gauss(0, 1) * scale
    row = head | {
        "cosine": cosine, "cosine_se": 1.2 * scale, "cosine_sd": scale, "z": cosine / scale,
        "p": 0.0021, "null": "rotation", "z_groups": 1.8 * cosine / scale,
        "z_rows": 1.4 * cosine / scale,
        "z_channels": 1.2 * cosine / scale, "z_rotation": cosine / scale, "norm_a": 0.4,
        "norm_b": 11.0, "norm_ratio": 0.4 / 11, "density_a": 0.12, "density_b": 0.93,
        "jaccard": 0.12,
        "lift": 1.04, "overlap_z": 21.0, "sign_agreement": 0.503, "sign_z": 3.1,
        "conflict_a": 0.44, "conflict_b": 0.05, "on_support_a": 0.93, "on_support_b": 0.12,
        "along": cosine**2, "control_cosine": control, "control_z": control / scale,
    }  # fmt: skip
    numbers = (0.031, 0.044, 0.0039, 0.002, 0.001, 1.5e-5)
    return row | {
        key: abs(draw.gauss(value, value / 4)) if subspace else None
        for key, value in zip(SUBSPACE, numbers, strict=True)
    }


def levels(draw: random.Random, tensors: list[Row], make: Any) -> Row:
    """Return rows at every level; those of groups are drawn, not summed: only shape matters."""
    groups: Row = {"tensors": [make(row) for row in tensors]}
    groups["parts"] = [make({"name": name, "numel": 10**6}) for name in ("layers", "outside")]
    for level, key in (("modules", "module"), ("kinds", "kind"), ("layers", "layer")):
        names = dict.fromkeys(row[key] or "(no layer)" for row in tensors)
        groups[level] = [make({"name": name, "numel": 10**6}) for name in names]
    numel = sum(row["numel"] for row in tensors)
    return groups | {"overall": make({"name": "overall", "numel": numel})}


def fake_report(
    layers: int = 2, labels: tuple[str, ...] = ("rl-math", "sft-med", "sft-law"),
    subspace: bool = True, tensors: list[Row] | None = None, verb: str = "orthogonality",
) -> Row:  # fmt: skip
    """Return a report of the right shape with a few nulls; the same one for the same arguments."""
    draw = random.Random(7)
    heads = tensors if tensors is not None else tensors_of(layers)
    lineage = ["BF16 - BF16", "F32 - BF16", "BF16 - BF16"][: len(labels)]
    norms, pairs = [], []
    for i, label in enumerate(labels):
        rms = 10 ** -(5.5 - i / 2)

        def vector(head: Row, rms: float = rms) -> Row:
            return vector_row(draw, head, rms * draw.uniform(0.5, 2), subspace)

        entry = {"label": label, "lineage": lineage[i], **levels(draw, heads, vector)}
        entry["tensors"][3] |= {"norm": 0.0, "rms": 0.0, "density": 0.0, "steps": None}
        norms.append(entry)
    for i, j in combinations(range(len(labels) if verb == "orthogonality" else 0), 2):

        def pair(head: Row, centre: float = 2.0 * (j - i)) -> Row:
            return pair_row(draw, head, centre, subspace)

        rows = levels(draw, heads, pair)
        rows["tensors"][3] |= {
            "cosine": None,
            "cosine_sd": None,
            "z": None,
            "norm_a": 0.0,
            "control_z": None,
        }
        top = [{"name": "model.layers.1", "share": 0.31, "cosine": 1e-3, "z": 2.5,
                "p": 0.01, "conflict": 0.4}]  # fmt: skip
        pairs.append({
            "a": labels[i], "b": labels[j], "lineage_a": lineage[i], "lineage_b": lineage[j],
            "control": "random", **rows,
            "sentence": "The two deltas are closer than unrelated directions: 4.1 times the spread"
            " of chance, where the control shows 0.3.",
            "forecast": {"along": 2e-6, "on_support": 0.93, "conflict": 0.44, "layers": top,
                         "in_subspace": 0.002 if subspace else None,
                         "sentence": "Adding a to b meets b's support with 93 % of its energy."},
        })  # fmt: skip
    asked = {"k": 16, "device": "cpu", "exact": 120, "randomised": 9, "left_out": 4, "error": 2e-3}
    return {
        "verb": verb, "schema": 2, "vectors": list(labels), "lineage": lineage,
        "against": "Qwen/Qwen2.5-7B", "control": "random", "seed": 0,
        "subspace": asked if subspace else None, "activations": None, "step_edges": STEP_EDGES,
        "norms": norms, "pairs": pairs, "counts": {"compared": len(heads)},
        "tensors": [{"name": "ledger"}],
        "warnings": ["rl-math was taken between 16-bit checkpoints: 88 % of its values are 0."],
    }  # fmt: skip


def drawn(report: Row) -> dict[str, Row]:
    """Return the specs of a report's figures by name."""
    return {figure.name: figure.spec for figure in draw_figures(report)}


def unpacked(held: Row) -> list[Row]:
    return [dict(zip(held["columns"], row, strict=True)) for row in held["rows"]]


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c")])
def test_the_answer_stands_first_then_picture_numbers_and_the_rest(labels: tuple[str, ...]) -> None:
    report = fake_report(labels=labels)
    parsed = Parsed(angle_page.html(report))
    check_structure(parsed)
    order = [*parsed.ids]
    assert order.index("answer") < order.index("picture") < order.index("carried")
    lead = re.search(
        r"(A and B (are|is).*?|\d of 3 pairs .*?|All 3 pairs .*?|One of .*?)\.\n", parsed.shown
    )
    assert lead and parsed.shown.index("Orthogonality of") < lead.start()
    assert (
        lead.end()
        < parsed.shown.index("The numbers behind it")
        < parsed.shown.index("Keep in mind")
    )
    assert parsed.shown.count("Keep in mind") == 1 and "88 %" in parsed.shown
    assert "chance ±" in parsed.shown and "Stage" not in parsed.shown
    assert [line for line in parsed.folded if ", in full" in line] == [
        f"{' and '.join(two)}, in full" for two in combinations("ABC"[: len(labels)], 2)
    ]


def test_letters_say_whose_they_are_where_one_points_at_them() -> None:
    text = angle_page.html(fake_report(labels=("models/rl::base", "b")))
    parsed = Parsed(text)
    titles = [held["title"] for held in parsed.find("abbr")]
    assert titles.count("models/rl::base (BF16 - BF16)") >= 3
    lead = text[text.index('class="lead"') :][:200]
    assert '<abbr title="models/rl::base (BF16 - BF16)">A</abbr>' in lead
    assert "models/rl::base" in parsed.shown  # and the legend says it once for all


def test_every_number_that_is_shown_is_explained() -> None:
    parsed = Parsed(angle_page.html(fake_report()))
    names = {"#pair-cosine", "#pair-z", "#pair-norm_ratio", "#pair-lift", "#vector-rms"}
    assert names <= {held["href"] for held in parsed.find("a", **{"class": "term"})}
    (meaning,) = {held["title"] for held in parsed.find("a", href="#pair-cosine")}
    assert meaning and meaning.startswith("How far two updates point the same way")


def test_the_documentation_is_linked_where_the_package_states_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Metadata:
        def get_all(self, name: str) -> list[str]:
            assert name == "Project-URL"
            return ["Source, https://example.com/x", "Documentation, https://example.com/docs/"]

    assert '<a href="http' not in angle_page.html(fake_report())
    monkeypatch.setattr(page, "metadata", lambda name: Metadata())
    links = Parsed(angle_page.html(fake_report())).find("a")
    outside = {held["href"] for held in links if (held["href"] or "").startswith("http")}
    assert "https://example.com/docs/orthogonality/#pair-cosine" in outside


def test_page_stands_alone() -> None:
    check_stands_alone(Parsed(angle_page.html(fake_report())))


def test_page_embeds_every_row() -> None:
    report = fake_report()
    report["pairs"][0]["kinds"][0] |= {"lift": inf, "jaccard": nan}
    held = Parsed(angle_page.html(report)).json("report")
    for kind, levels in (("pairs", report["pairs"]), ("norms", report["norms"])):
        for entry, packed in zip(levels, held[kind], strict=True):
            for level in angle_page.LEVELS:
                for row, found in zip(entry[level], unpacked(packed["levels"][level]), strict=True):
                    known = {key: value for key, value in row.items() if value not in (None, inf)}
                    known = {key: value for key, value in known.items() if value == value}
                    assert {key: found[key] for key in known} == {
                        key: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                        for key, value in known.items()
                    }
    first = unpacked(held["pairs"][0]["levels"]["kinds"])[0]
    assert first["lift"] is None and first["jaccard"] is None
    assert held["letters"]["B"] == "sft-med (F32 - BF16)"


def hostile(layers: int = 2) -> Row:
    """Return a report in which every name that a stranger may choose is hostile."""
    heads = tensors_of(layers)
    for row in heads[:3]:
        row["name"] = row["name"].replace("model", HOSTILE)
        row["kind"] += HOSTILE
        row["module"] = HOSTILE
    report = fake_report(labels=(HOSTILE, "b\x1b[0m\u200b\ud800"), tensors=heads)
    report["warnings"].append(HOSTILE)
    report["pairs"][0]["sentence"] = report["against"] = report["control"] = HOSTILE
    report["pairs"][0]["control"] = report["pairs"][0]["forecast"]["layers"][0]["name"] = HOSTILE
    return report


def test_hostile_names_stay_text() -> None:
    text = angle_page.html(hostile())
    plain, tame = Parsed(text), Parsed(angle_page.html(fake_report(labels=("a", "b"))))
    assert "mark" not in {tag for tag, _ in plain.tags}
    assert [tag for tag, _ in plain.tags if tag == "script"] == ["script"] * 2
    assert sorted(plain.raw) == sorted(tame.raw)
    assert plain.text.count(HOSTILE) >= 8
    assert HOSTILE in plain.json("report")["letters"]["A"]
    text.encode()  # a name that is no UTF-8 must not keep the page from being written
    assert not {"\x1b", "\u200b"} & set(text)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*(-\d+)?", name) for name in drawn(hostile()))
    for _, data in islice(page.figures(hostile()), 0, 4, 2):
        ET.fromstring(data)


def test_a_drawing_keeps_nothing_but_what_draws() -> None:
    head = ET.fromstring(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 5" width="9" onload="x()">'
        '<script>x()</script><a href="x"><path d="M0,0"/></a><clipPath id="c"/>'
        '<g clip-path="url(#c)" class="k" opacity="1"><path d="M1.23456,2"/><text>&lt;b></text></g>'
        "</svg>"
    )
    found = ET.tostring(charts.clean(head, "n"), encoding="unicode")
    assert found == (
        '<svg viewBox="0 0 9 5" style="max-width:9px" aria-hidden="true"><clipPath id="n-c" />'
        '<g clip-path="url(#n-c)"><path d="M1.2,2" /><text>&lt;b&gt;</text></g></svg>'
    )


def cells(spec: Row) -> dict[tuple[str, str], Row]:
    values = spec["data"]["values"]
    found = {(value["layer"], value["kind"]): value for value in values}
    assert len(found) == len(values)
    return found


def maps_of(parsed: Parsed) -> dict[str, dict[tuple[str, str], str]]:
    """Return the texts of the cells of every heat map, by layer and kind."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    names = [held["id"] or "" for held in parsed.find("div", **{"class": "heat"})]
    tables = [t for t in parsed.tables if (t.attributes.get("class") or "").split()[:1] in
              (["map"], ["outside"])]  # fmt: skip
    for table, name in zip(tables, [name for name in names for _ in range(2)], strict=True):
        head, *rows = table.rows
        kinds = [text for _, _, text in head]
        for row, held in zip(rows, table.row_attributes[1:], strict=True):
            layer = held["data-layer"] or ""
            for (tag, _, text), kind in zip(row, kinds, strict=True):
                if tag == "td":
                    found.setdefault(name.removeprefix("map-"), {})[layer, kind] = text
    return found


@pytest.mark.parametrize("layers", [2, 32])
def test_one_cell_for_each_layer_and_kind(layers: int) -> None:
    report = fake_report(layers)
    specs, found = drawn(report), maps_of(Parsed(angle_page.html(report)))
    place = {(str(i), kind.removesuffix(".weight")) for i in range(layers) for kind in KINDS}
    place |= {("(no layer)", kind.removesuffix(".weight")) for kind in OUTSIDE}
    on_page = {(f"model.layers.{i}" if i.isdecimal() else "", kind) for i, kind in place}
    for name in [f"{key}-{i}" for key in ("cosine", "z", "rms", "density") for i in (1, 2, 3)]:
        assert cells(specs[name]).keys() == place, name
        layer_axis = specs[name]["encoding"]["y"]["sort"]
        assert layer_axis == [*map(str, range(layers)), "(no layer)"]
        assert found[name].keys() == on_page, name
    for row in report["pairs"][1]["tensors"]:
        kind = row["kind"].removesuffix(".weight")
        for key in ("cosine", "z"):
            value = cells(specs[f"{key}-2"])[row["layer"].rpartition(".")[2] or "(no layer)", kind]
            assert value["value"] == (row[key] and pytest.approx(row[key], rel=1e-5))
        text = found["z-2"][row["layer"], kind]
        assert text == ("–" if row["z"] is None else f"{row['z'] + 0:.0f}".replace("-0", "0")
                        .replace("-", "−"))  # fmt: skip


def test_a_map_without_any_value_is_no_empty_board() -> None:
    report = fake_report(labels=("a", "b"))
    for row in report["pairs"][0]["tensors"]:
        row |= {"cosine": None, "z": None}
    parsed = Parsed(angle_page.html(report))
    check_structure(parsed)
    titles = [table.caption for table in parsed.tables if "by layer" in table.caption]
    assert titles and not any(title.startswith(("Cosine", "z ")) for title in titles)
    assert parsed.shown.count("No value in any layer: ") == 2  # cosine and z


def test_chance_is_never_wider_than_a_cosine_can_be() -> None:
    report = fake_report(labels=("a", "b"))
    report["pairs"][0]["overall"] |= {"cosine": 0.1, "cosine_sd": 0.6, "z": 0.2, "p": 0.8}
    assert "chance alone gives ±1." in Parsed(angle_page.html(report)).shown
    assert write_spread({"cosine_sd": 0.6}) == "1" and write_spread({"cosine_sd": None}) == "-"


def test_two_stacks_of_layers_keep_their_names() -> None:
    heads = tensors_of(2)
    heads += [
        {**row, "name": f"v.{row['name']}", "layer": f"v.{row['layer']}"} for row in heads[:4]
    ]
    axis = drawn(fake_report(tensors=heads))["z-1"]["encoding"]["y"]["sort"]
    stacks = ["model.layers.0", "model.layers.1", "v.model.layers.0", "(no layer)"]
    assert axis == stacks


def test_colours_are_centred_and_follow_the_span() -> None:
    report = fake_report()
    for row in report["pairs"][0]["tensors"]:
        row |= {"cosine": -0.1, "norm_a": 1.0}
    report["pairs"][0]["tensors"][0]["cosine"] = 0.3
    scale = drawn(report)["cosine-1"]["encoding"]["color"]["scale"]
    assert scale["domain"] == [pytest.approx(-0.3), pytest.approx(0.3)]
    assert scale["domainMid"] == 0 and "type" not in scale
    report["pairs"][0]["tensors"][0]["cosine"] = 0.9
    assert drawn(report)["cosine-1"]["encoding"]["color"]["scale"]["type"] == "symlog"
    assert "type" not in drawn(report)["rms-1"]["encoding"]["color"]["scale"]
    report["norms"][0]["tensors"][0]["norm"] *= 100
    assert drawn(report)["rms-1"]["encoding"]["color"]["scale"]["type"] == "log"


def test_histogram_counts_every_tensor_once() -> None:
    report = fake_report(32)
    rows = report["pairs"][0]["tensors"]
    rows[0]["z"], rows[1]["z"] = 1e4, -1e4
    spec = drawn(report)["histogram-1"]
    bars, control, chance = (layer["data"]["values"] for layer in spec["layer"])
    assert sum(bar["tensors"] for bar in bars) == sum(row["z"] is not None for row in rows)
    assert bars[0]["tensors"] >= 1 <= bars[-1]["tensors"]
    assert sum(bar["tensors"] for bar in control) == len(rows) - 1
    assert sum(point["tensors"] for point in chance) / 4 == pytest.approx(len(rows) - 1, rel=1e-3)
    for row in rows:
        row["control_z"] = None
    assert len(drawn(report)["histogram-1"]["layer"]) == 2


def marks(svg: bytes) -> int:
    """Return the number of cells drawn in a heat map."""
    groups = (element for element in ET.fromstring(svg).iter() if element.tag.endswith("}g"))
    return sum(len(group) for group in groups if "cells_marks" in group.get("class", ""))


def test_figures_are_those_of_the_page() -> None:
    report = fake_report(2, ("a", "b"), subspace=False)
    files = dict(page.figures(report))
    specs = drawn(report)
    assert list(files) == [f"{name}.{kind}" for name in specs for kind in ("svg", "png")]
    for name, spec in specs.items():
        svg, png = files[f"{name}.svg"], files[f"{name}.png"]
        head = ET.fromstring(svg)
        assert head.tag.endswith("svg") and head[0].get("fill") == "#ffffff"
        if spec.get("name") == "cells":
            assert marks(svg) == len(cells(spec)) == 25
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(png[16:20]) == pytest.approx(2.5 * float(head.get("width")), abs=3)


def test_page_of_norms_alone() -> None:
    report = fake_report(2, ("only",), subspace=False, verb="norms")
    parsed = Parsed(angle_page.html(report))
    check_structure(parsed)
    assert [*drawn(report)] == ["rms-1", "density-1", "steps", "rms-layers", "density-layers"]
    assert "Norms of a skill vector" in parsed.shown and "A changes " in parsed.shown
    assert ", most per value in " in parsed.shown
    assert maps_of(parsed).keys() == {"rms-1", "density-1"}
    assert len(parsed.find("svg")) == 3


def test_every_number_may_be_missing() -> None:
    report = fake_report()
    for rows in [*report["norms"], *report["pairs"]]:
        for level in ("parts", "modules", "kinds", "layers", "tensors"):
            for row in [*rows[level], rows["overall"]]:
                row |= dict.fromkeys(row.keys() - {"name", "layer", "kind", "numel"})
    for pair in report["pairs"]:
        pair |= {"forecast": None, "control": None}
    specs = drawn(report)
    assert set(specs) == {f"{k}-{i}" for k in ("cosine", "z", "rms", "density") for i in (1, 2, 3)}
    empty = [value["value"] for value in cells(specs["cosine-1"]).values()]
    assert empty == [None] * 25
    assert marks(next(page.figures(report))[1]) == 25
    parsed = Parsed(angle_page.html(report))
    check_structure(parsed)
    assert "None of the 3 pairs" in parsed.shown and "No value in any layer" in parsed.shown
    for rows in [*report["norms"], *report["pairs"]]:
        rows["tensors"] = []
    assert drawn(report) == {} and not maps_of(Parsed(angle_page.html(report)))


def test_dtypes_stand_beside_the_numbers() -> None:
    one = Parsed(angle_page.html(fake_report(2, ("a", "b"))))
    assert one.text.count("A: BF16 - BF16, B: F32 - BF16; control in place of A: random.") == 1
    assert "F32 - BF16" in one.shown  # the legend
    for figure in draw_figures(fake_report(2, ("a", "b", "c"))):
        assert "BF16" in " ".join(figure.spec["title"]["subtitle"])


def test_numbers_are_read_as_a_person_does() -> None:
    report = fake_report(labels=("a", "b"))
    report["pairs"][0]["overall"] |= {"cosine": -0.0123456, "cosine_sd": 0.001, "p": 0.0}
    text = Parsed(angle_page.html(report)).text
    assert "−0.0123 chance ±0.002" in text and "p < 1e−300" in text
    assert "their cosine is −0.0123, where chance alone gives ±0.002" in text
    report["pairs"][0]["overall"]["cosine"] = None
    assert "−0.0123" not in Parsed(angle_page.html(report)).text


def test_labels_too_long_for_a_legend_stay_apart() -> None:
    labels = tuple(f"/{part}{'/long' * 20}" for part in "abc")
    spec = drawn(fake_report(labels=labels))["rms-layers"]
    assert len({value["series"] for value in spec["data"]["values"]}) == 3


@pytest.mark.parametrize("module", ["vl_convert", "jinja2"])
def test_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page.check_available()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf'{module}.*: pip install "skillvec\[report\]"'):
        angle_page.html(fake_report())
