"""The page and the figures of a report: what they hold, and what a browser makes of them."""

import html
import json
import os
import random
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import combinations, islice
from math import inf, isfinite, nan, sqrt
from pathlib import Path
from typing import Any

import pytest

from skillvec.analysis import page
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
        "p": 0.0021, "null": "rotation", "z_groups": 1.8 * cosine / scale, "norm_a": 0.4,
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


class Parsed(HTMLParser):
    """Tags with their attributes, the text outside of scripts, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside, self.raw, self.text = [""], {}, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(dict(attrs).get("id") or f"{tag} {len(self.raw)}")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside[-1]:
            self.raw[self.inside[-1]] = self.raw.get(self.inside[-1], "") + data
        else:
            self.text += data

    def json(self, name: str) -> Any:
        return json.loads(self.raw[name])


def drawn(report: Row) -> dict[str, Row]:
    """Return the specs of a report's figures by name."""
    return Parsed(page.html(report)).json("figures")["specs"]


def cells(spec: Row) -> dict[tuple[str, str], Row]:
    values = spec["data"]["values"]
    found = {(value["layer"], value["kind"]): value for value in values}
    assert len(found) == len(values)
    return found


def same(a: Any, b: Any) -> bool:
    """Compare plain data, floats to six digits, what is no number in JSON as null."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return b == pytest.approx(a, rel=1e-5) if isfinite(a) else b is None
    return a == b and type(a) is type(b)


def test_page_stands_alone() -> None:
    parsed = Parsed(page.html(fake_report()))
    loads = {"src", "href", "srcset", "action", "data", "poster", "background"}
    assert not [(tag, attrs) for tag, attrs in parsed.tags if loads & attrs.keys()]
    assert not {"link", "img", "iframe", "base"} & {tag for tag, _ in parsed.tags}
    style = "".join(text for name, text in parsed.raw.items() if name.startswith("style"))
    assert "@import" not in style and "url(" not in style
    policy = [a["content"] for _, a in parsed.tags if a.get("http-equiv")]
    assert len(policy) == 1 and "default-src 'none'" in policy[0]
    assert "http" not in policy[0] and "eval" not in policy[0]


def test_page_embeds_the_report() -> None:
    report = fake_report()
    report["pairs"][0]["overall"] |= {"p": 0.0, "lift": inf, "jaccard": nan}
    embedded = Parsed(page.html(report)).json("report")
    assert same({key: value for key, value in report.items() if key != "tensors"}, embedded)
    report["pairs"][1]["layers"][0]["z"] += 0.1
    assert not same({key: value for key, value in report.items() if key != "tensors"}, embedded)


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
    text = page.html(hostile())
    plain, tame = Parsed(text), Parsed(page.html(fake_report(labels=("a", "b"))))
    assert "mark" not in {tag for tag, _ in plain.tags}
    assert [tag for tag, _ in plain.tags if tag == "script"] == ["script"] * 4
    assert sorted(plain.raw) == sorted(tame.raw)
    assert plain.text.count(HOSTILE) >= 8
    assert plain.json("report")["vectors"] == [HOSTILE, "b\x1b[0m\u200b\ud800"]
    text.encode()  # a name that is no UTF-8 must not keep the page from being written
    assert not {"\x1b", "\u200b"} & set(text)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*(-\d+)?", name) for name in drawn(hostile()))
    for _, data in islice(page.figures(hostile()), 0, 4, 2):
        ET.fromstring(data)


@pytest.mark.parametrize("layers", [2, 32])
def test_one_cell_for_each_layer_and_kind(layers: int) -> None:
    report = fake_report(layers)
    specs = drawn(report)
    place = {(str(i), kind.removesuffix(".weight")) for i in range(layers) for kind in KINDS}
    place |= {("(no layer)", kind.removesuffix(".weight")) for kind in OUTSIDE}
    for name in [f"{key}-{i}" for key in ("cosine", "z", "rms", "density") for i in (1, 2, 3)]:
        assert cells(specs[name]).keys() == place, name
        layer_axis = specs[name]["encoding"]["y"]["sort"]
        assert layer_axis == [*map(str, range(layers)), "(no layer)"]
    for row in report["pairs"][1]["tensors"]:
        where = row["layer"].rpartition(".")[2] or "(no layer)", row["kind"].removesuffix(".weight")
        for key in ("cosine", "z"):
            value = cells(specs[f"{key}-2"])[where]["value"]
            assert value == (row[key] and pytest.approx(row[key], rel=1e-5))
        tip = cells(specs["cosine-2"])[where]
        assert tip["tensor"] == row["name"] and tip["dtypes"] == "A: BF16 - BF16, B: BF16 - BF16"


def test_two_stacks_of_layers_keep_their_names() -> None:
    heads = tensors_of(2)
    heads += [
        {**row, "name": f"v.{row['name']}", "layer": f"v.{row['layer']}"} for row in heads[:4]
    ]
    axis = drawn(fake_report(tensors=heads))["z-1"]["encoding"]["y"]["sort"]
    stacks = ["model.layers.0", "model.layers.1", "v.model.layers.0", "(no layer)"]
    assert axis == stacks


def test_experts_of_a_layer_are_one_cell() -> None:
    kind = "mlp.experts.*.up_proj.weight"
    heads = [
        {
            "name": f"model.layers.0.mlp.experts.{i}.up_proj.weight",
            "layer": "model.layers.0",
            "kind": kind,
            "module": "mlp",
            "numel": numel,
        }
        for i, numel in enumerate((100, 300))
    ]
    report = fake_report(tensors=[*heads, *tensors_of(1)])
    pair, norms = report["pairs"][0], report["norms"][0]
    first, second = pair["tensors"][:2]
    first |= {"cosine": 0.5, "cosine_sd": 0.25, "norm_a": 3.0, "norm_b": 4.0}
    second |= {"cosine": -1.0, "cosine_sd": 1 / 3, "norm_a": 4.0, "norm_b": 3.0}
    norms["tensors"][0] |= {"norm": 3.0, "density": 0.5}
    norms["tensors"][1] |= {"norm": 4.0, "density": 0.1}
    specs = drawn(report)
    place = "0", kind.removesuffix(".weight")
    # <a, b> = 0.5 * 12 - 12 = -6 with a spread of (3^2 + 4^2)^.5, |a| = |b| = 5, 400 values.
    assert cells(specs["cosine-1"])[place]["value"] == pytest.approx(-6 / 25)
    assert cells(specs["z-1"])[place]["value"] == pytest.approx(-6 / 5)
    assert cells(specs["rms-1"])[place]["value"] == pytest.approx(5 / 20)
    assert cells(specs["density-1"])[place]["value"] == pytest.approx(0.2)
    tip = cells(specs["cosine-1"])[place]
    assert (tip["values"], tip["norm A"], tip["tensor"][-11:]) == ("400", "5", " and 1 more")
    second["cosine"] = None  # no angle: it adds nothing to the inner product
    assert cells(drawn(report)["cosine-1"])[place]["value"] == pytest.approx(6 / 25)


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
    parsed = Parsed(page.html(report))
    names = list(parsed.json("figures")["specs"])
    assert names == ["rms-1", "density-1", "steps", "rms-layers", "density-layers"]
    assert "Answer" not in parsed.text and "Norms of 1 skill vector" in parsed.text
    slots = [attrs["data-figure"] for _, attrs in parsed.tags if "data-figure" in attrs]
    assert sorted(slots) == sorted(names)


def test_every_number_may_be_missing() -> None:
    report = fake_report()
    for rows in [*report["norms"], *report["pairs"]]:
        for level in ("modules", "kinds", "layers", "tensors"):
            for row in [*rows[level], rows["overall"]]:
                row |= dict.fromkeys(row.keys() - {"name", "layer", "kind", "numel"})
    for pair in report["pairs"]:
        pair |= {"forecast": None, "control": None}
    specs = drawn(report)
    assert set(specs) == {f"{k}-{i}" for k in ("cosine", "z", "rms", "density") for i in (1, 2, 3)}
    empty = [value["value"] for value in cells(specs["cosine-1"]).values()]
    assert empty == [None] * 25
    assert marks(next(page.figures(report))[1]) == 25
    for rows in [*report["norms"], *report["pairs"]]:
        rows["tensors"] = []
    assert drawn(report) == {}


def test_dtypes_stand_beside_the_numbers() -> None:
    one, three = (Parsed(page.html(fake_report(2, labels))) for labels in
                  (("a", "b"), ("a", "b", "c")))  # fmt: skip
    assert one.text.count("A: BF16 - BF16, B: F32 - BF16") == 1
    assert "A, dtypes" not in one.text
    assert three.text.count("A, dtypes") == 1  # the table of all pairs
    assert three.text.count("\nF32 - BF16") == 2
    for spec in three.json("figures")["specs"].values():
        assert "BF16" in " ".join(spec["title"]["subtitle"])


def test_numbers_are_read_as_a_person_does() -> None:
    report = fake_report(labels=("a", "b"))
    report["pairs"][0]["overall"] |= {"cosine": -0.0123456, "cosine_sd": 0.001, "p": 0.0}
    text = Parsed(page.html(report)).text
    assert "−0.0123, chance ± 0.002" in text and "< 1e−300" in text
    report["pairs"][0]["overall"]["cosine"] = None
    assert "−0.0123" not in Parsed(page.html(report)).text


def test_labels_too_long_for_a_legend_stay_apart() -> None:
    labels = tuple(f"/{part}{'/long' * 20}" for part in "abc")
    spec = drawn(fake_report(labels=labels))["rms-layers"]
    assert len({value["series"] for value in spec["data"]["values"]}) == 3


@pytest.mark.parametrize("module", ["vl_convert", "jinja2"])
def test_missing_package_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page.check_available()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf'{module}.*: pip install "skillvec\[report\]"'):
        page.html(fake_report())


# --------------------------------------------------------------------------- in a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LAYERS = 20  # 223 tensors: more than the 200 rows that the table shows at first
LISTEN = """<script>
const findings = { errors: [] };
addEventListener("error", event => findings.errors.push(event.message));
addEventListener("unhandledrejection", event => findings.errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => findings.errors.push(event.violatedDirective));
</script>"""


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Row:
    """Open a hostile page of 390 pixels in a browser and return what the driver saw there."""
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    folder = tmp_path_factory.mktemp("page")
    text = page.html(hostile(LAYERS)).replace("<head>", f"<head>{LISTEN}", 1)
    start, _, end = text.rpartition("</body>")
    driver = (Path(__file__).parents[1] / "support" / "page_driver.js").read_text()
    path = folder / "page.html"
    path.write_text(f"{start}<script>{driver}</script></body>{end}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,900", "--dump-dom",
             "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--blink-settings=preferredColorScheme=1",
             f"--user-data-dir={folder / 'profile'}"]  # fmt: skip
    env = os.environ | {"HOME": str(folder)}
    run = subprocess.run(
        [BROWSER, *flags, path.as_uri()], capture_output=True, timeout=120, env=env
    )
    errors = run.stderr.decode(errors="replace")
    found = re.search(r'<pre id="findings">(.*?)</pre>', run.stdout.decode(), re.DOTALL)
    assert found, errors[-2000:]
    console = [line for line in errors.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])) | {"console": console}


def test_browser_reports_no_error_and_loads_nothing(findings: Row) -> None:
    assert findings["errors"] == [] and findings["console"] == []
    assert findings["requests"] == [] and findings["images"] == findings["marks"] == 0


def test_browser_draws_every_cell(findings: Row) -> None:
    specs = drawn(hostile(LAYERS))
    want = {name: len(cells(spec)) if spec.get("name") == "cells" else 0
            for name, spec in specs.items()}  # fmt: skip
    assert findings["cells"] == want and want["cosine-1"] == 11 * LAYERS + 3
    assert findings["drawings"] == len(specs)
    assert findings["dashed"] == 1  # the null of the fake report


def test_browser_shows_numbers_of_a_cell(findings: Row) -> None:
    row = hostile(LAYERS)["pairs"][0]["tensors"][9]
    assert row["name"] in findings["tip"]
    assert f"{row['cosine']:+.3g}".replace("-", "−") in findings["tip"]
    assert "A: BF16 - BF16, B: F32 - BF16" in findings["tip"]
    assert "mark title=x" in findings["hostile_tip"]


def test_browser_sorts_and_filters_rows(findings: Row) -> None:
    rows = hostile(LAYERS)["pairs"][0]["tensors"]
    known = sorted((row for row in rows if row["cosine"] is not None), key=lambda r: r["cosine"])
    void = [row["name"] for row in rows if row["cosine"] is None]
    assert findings["rising"] == [row["name"] for row in known] + void
    assert findings["falling"] == [row["name"] for row in reversed(known)] + void
    assert findings["sorts"] == ["ascending", "descending"]
    kept = [row["name"] for row in rows if "layers.1.mlp" in row["name"]]
    assert sorted(findings["filtered"]) == sorted(kept) and len(kept) == 3
    assert findings["levels"] == {"modules": 7, "kinds": 17, "layers": LAYERS + 1, "tensors": 200}
    assert "density" in findings["norm_columns"] and "cosine" not in findings["norm_columns"]


def test_browser_follows_the_scheme(findings: Row) -> None:
    assert findings["light"] == {"page": "rgb(255, 255, 255)", "chart": "rgb(255, 255, 255)"}
    assert findings["dark"] == {"page": "rgb(21, 23, 27)", "chart": "rgb(21, 23, 27)"}
    assert findings["printed"] == "rgb(255, 255, 255)"


def test_browser_fits_a_phone(findings: Row) -> None:
    assert findings["overflow"] == []
    assert findings["page_width"] <= findings["window_width"] < 520
