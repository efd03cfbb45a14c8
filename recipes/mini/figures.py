"""The figures of docs/reproduction.md, drawn by Vega-Lite without a browser (vl-convert).

Hides the plotting library. Every figure has a white background, so that it can be read on a dark
page as well; bands and whiskers are the standard deviation over seeds, dots are single seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from skillvec.recipes.mini.results import NAMES, Results, find_pair
from skillvec.recipes.mini.seed import BITS, DOMAINS, LAMBDAS, PROBED, TWICE

Spec = dict[str, Any]

COLOURS = {"people": "#2a6fb0", "apis": "#d1690e"}
CONFIG = {
    "font": "Helvetica, Arial, sans-serif",
    "background": "white",
    "view": {"stroke": None},
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
             "gridColor": "#e8e8e8", "domainColor": "#888", "tickColor": "#888"},
    "legend": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
    "title": {"fontSize": 14, "anchor": "start", "subtitleFontSize": 12, "subtitleColor": "#555"},
    "header": {"labelFontSize": 13, "titleFontSize": 13},
}  # fmt: skip
ARMS = ("base", "SFT only", "random", "shuffled", "lambda -1", "lambda 1", "K = 2",
        f"K = 1, {TWICE}", f"K = 2, {TWICE}", "pre-injection", "sequential", "bf16 vector",
        *(f"bits {bits}" for bits in BITS), "layers", "embeddings", "rank 4", "rank 1",
        "residual", "RL on the target")  # fmt: skip
MODULES = [*(f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")),
           "input_norm", "post_norm", "embed_tokens", "norm"]  # fmt: skip


def draw(results: Results) -> Iterator[tuple[str, bytes]]:
    """Yield the file name and the SVG of every figure."""
    import vl_convert

    for name, spec in (
        ("lambda", _lambda_curve(results)),
        ("arms", _arms(results)),
        ("layers", _layers(results)),
        ("forgetting", _forgetting(results)),
    ):
        svg = vl_convert.vegalite_to_svg(spec, config=CONFIG, allowed_base_urls=[])
        yield f"{name}.svg", svg.encode()


def _colour() -> Spec:
    scale = {"domain": list(COLOURS), "range": list(COLOURS.values())}
    legend = {"symbolOpacity": 1, "title": "target"}
    return {"field": "domain", "type": "nominal", "scale": scale, "legend": legend}


def _quantity(field: str, title: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **more}


def _lambda_curve(results: Results) -> Spec:
    rows, noise = [], []
    for domain in DOMAINS:
        for lam in sorted((*LAMBDAS, 0.0)):
            spread = results.exact(domain, f"lambda {lam:g}" if lam else "SFT only")
            rows += [{"domain": domain, "lam": lam, "exact": value} for value in spread.values]
        noise += [{"domain": domain, "lam": 1, "exact": results.exact(domain, kind).mean}
                  for kind in ("random", "shuffled")]  # fmt: skip
    x = _quantity("lam", "lambda", axis={"values": [-1, -0.5, 0, 0.5, 1, 1.5, 2]})
    y = _quantity("exact", "exact match on T", scale={"domain": [0, 1]})
    base = {"data": {"values": rows}}
    return {
        "title": {
            "text": "theta_sft_T + lambda v, asked about T",
            "subtitle": "RL never saw T. 0: SFT only. Crosses: noise of the norm of v, v shuffled",
        },
        "width": 420, "height": 240,
        "layer": [
            {**base, "mark": {"type": "errorband", "extent": "stdev", "opacity": 0.2, "clip": True},
             "encoding": {"x": x, "y": y, "color": _colour()}},
            {**base, "mark": {"type": "line", "point": True},
             "encoding": {"x": x, "y": {**y, "aggregate": "mean"}, "color": _colour()}},
            {"data": {"values": noise},
             "mark": {"type": "point", "shape": "cross", "size": 90, "filled": True},
             "encoding": {"x": x, "y": y, "color": _colour()}},
        ],
    }  # fmt: skip


def _arms(results: Results) -> Spec:
    rows = [
        {"domain": domain, "arm": NAMES.get(arm, arm), "exact": value}
        for domain in DOMAINS
        for arm in ARMS
        if (domain, arm, "exact") in results.scores
        for value in results.exact(domain, arm).values
    ]
    y = {"field": "arm", "type": "nominal", "title": None,
         "sort": [NAMES.get(arm, arm) for arm in ARMS]}  # fmt: skip
    x = _quantity("exact", "exact match on T", scale={"domain": [0, 1]})
    return {
        "title": "Every seed (dots) and the mean (bars)",
        "data": {"values": rows},
        "facet": {"column": {"field": "domain", "type": "nominal", "title": None,
                             "sort": list(DOMAINS)}},
        "spec": {
            "width": 260, "height": {"step": 20},
            "layer": [
                {"mark": {"type": "bar", "opacity": 0.35, "height": 12},
                 "encoding": {"y": y, "x": {**x, "aggregate": "mean"},
                              "color": {**_colour(), "legend": None}}},
                {"mark": {"type": "point", "filled": True, "size": 22, "opacity": 0.8},
                 "encoding": {"y": y, "x": x, "color": {**_colour(), "legend": None}}},
            ],
        },
    }  # fmt: skip


def _layers(results: Results) -> Spec:
    """Cosine by layer and module, mean over seeds: v against SFT, beside SFT against SFT."""
    titles = {"v, SFT on T": "round-1/skill", "SFT on S, SFT on T": "round-1/sft"}
    sums: dict[tuple[str, str, str], list[float]] = {}
    for title, name in titles.items():
        for report in results.angles:
            for row in find_pair(report, f"people/{name}", "people/sft_t")["tensors"]:
                if row["cosine"] is None:
                    continue
                layer, module = _place(row["name"])
                sums.setdefault((title, layer, module), []).append(row["cosine"])
    rows = [{"pair": pair, "layer": layer, "module": module, "cosine": sum(v) / len(v)}
            for (pair, layer, module), v in sums.items()]  # fmt: skip
    text = [row | {"shown": f"{row['cosine']:+.2f}"} for row in rows]
    x = {"field": "module", "type": "nominal", "title": None, "sort": MODULES,
         "axis": {"labelAngle": -40}}  # fmt: skip
    y = {"field": "layer", "type": "nominal", "title": "layer"}
    scale = {"domain": [-1, 1], "domainMid": 0, "range": ["#0b4d94", "#f4f4f4", "#a11226"]}
    return {
        "title": {
            "text": "Cosine of two updates by layer and module",
            "subtitle": "people, mean over seeds: v of RL on S, and two SFT updates as the control",
        },
        "data": {"values": text},
        "facet": {"row": {"field": "pair", "type": "nominal", "title": None, "sort": list(titles),
                          "header": {"labelOrient": "top", "labelAnchor": "start"}}},
        "spec": {
            "width": {"step": 42}, "height": {"step": 26},
            "layer": [
                {"mark": "rect", "encoding": {"x": x, "y": y,
                 "color": _quantity("cosine", "cosine", scale=scale)}},
                {"mark": {"type": "text", "fontSize": 10}, "encoding": {
                    "x": x, "y": y, "text": {"field": "shown", "type": "nominal"},
                    "color": {"condition": {"test": "abs(datum.cosine) > .6", "value": "white"},
                              "value": "#333"}}},
            ],
        },
    }  # fmt: skip


def _place(name: str) -> tuple[str, str]:
    words = name.removesuffix(".weight").removeprefix("model.").split(".")
    if words[0] != "layers":
        return "none", words[-1]
    return words[1], words[-1].replace("post_attention_layernorm", "post_norm").replace(
        "input_layernorm", "input_norm"
    )


def _forgetting(results: Results) -> Spec:
    rows = [
        {"domain": domain, "arm": NAMES.get(arm, arm), "kl": kl, "exact": exact}
        for domain in DOMAINS
        for arm in PROBED
        for kl, exact in zip(
            results.probe(domain, arm, "kl").values,
            results.exact(domain, arm).values,
            strict=True,
        )
    ]
    return {
        "title": {"text": "What is gained on T and what is forgotten of the base",
                  "subtitle": "one dot a seed; up and left is better"},
        "data": {"values": rows},
        "facet": {"column": {"field": "domain", "type": "nominal", "title": None,
                             "sort": list(DOMAINS)}},
        "spec": {
            "width": 260, "height": 220,
            "mark": {"type": "point", "filled": True, "size": 50, "opacity": 0.85},
            "encoding": {
                "x": _quantity("kl", "KL from the base, nats a token", axis={"tickCount": 5}),
                "y": _quantity("exact", "exact match on T", scale={"domain": [0, 1]}),
                "color": {"field": "arm", "type": "nominal", "title": None,
                          "scale": {"scheme": "tableau10"},
                          "sort": [NAMES.get(arm, arm) for arm in PROBED]},
                "shape": {"field": "arm", "type": "nominal", "legend": None,
                          "sort": [NAMES.get(arm, arm) for arm in PROBED]},
            },
        },
    }  # fmt: skip
