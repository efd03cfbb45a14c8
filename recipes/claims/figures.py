"""The figures of a page of claims, drawn by Vega-Lite without a browser (vl-convert).

Hides the plotting library. Every figure has a white background, so that it can be read on a dark
page as well; bands and whiskers are the standard deviation over seeds, dots are single seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skillvec.recipes.claims.results import NAMES, Results, find_pair

Spec = dict[str, Any]

COLOURS = ("#2a6fb0", "#d1690e")  # of the domains
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
MODULES = [*(f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")),
           "input_norm", "post_norm", "embed_tokens", "norm"]  # fmt: skip


def specs(results: Results, arms: Sequence[str], probed: Sequence[str]) -> dict[str, Spec]:
    """Return the figures by name, without those that the results have no numbers for.

    `arms`: the bars, from top to bottom; `probed`: the models of the figure of forgetting.
    """
    found = {"arms": _arms(results, [arm for arm in arms if results.where(arm)])}
    if results.where(*results.curve.values()):
        found["lambda"] = lambda_curve(results)
    if results.angles:
        found["layers"] = _layers(results)
    if kept := [arm for arm in probed if results.where(arm, kl=(arm,))]:
        found["forgetting"] = _forgetting(results, kept)
    return found


def render(found: Mapping[str, Spec]) -> Iterator[tuple[str, bytes]]:
    """Yield the file name and the SVG of every figure."""
    import vl_convert

    for name, spec in found.items():
        svg = vl_convert.vegalite_to_svg(spec, config=CONFIG, allowed_base_urls=[])
        yield f"{name}.svg", svg.encode()


def colour(results: Results) -> Spec:
    """Return the encoding of domains by colour."""
    scale = {"domain": list(results.domains), "range": list(COLOURS)}
    legend = {"symbolOpacity": 1, "title": "target"}
    return {"field": "domain", "type": "nominal", "scale": scale, "legend": legend}


def quantity(field: str, title: str, **more: Any) -> Spec:
    """Return the encoding of a number."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def lambda_rows(results: Results) -> tuple[list[Spec], list[Spec]]:
    """Return the exact match of every seed at every lambda, and the means of noise at lambda 1."""
    rows, noise = [], []
    for domain in results.where(*results.curve.values()):
        for lam, arm in results.curve.items():
            values = results.exact(domain, arm).values
            rows += [{"domain": domain, "lam": lam, "exact": value} for value in values]
        noise += [{"domain": domain, "lam": 1, "exact": results.exact(domain, kind).mean}
                  for kind in ("random", "shuffled") if domain in results.where(kind)]  # fmt: skip
    return rows, noise


def lambda_curve(results: Results) -> Spec:
    """Draw exact match by lambda: means, their standard deviation over seeds, noise as crosses."""
    rows, noise = lambda_rows(results)
    x = quantity("lam", "lambda", axis={"values": [-1, -0.5, 0, 0.5, 1, 1.5, 2]})
    y = quantity("exact", "exact match on T", scale={"domain": [0, 1]})
    base = {"data": {"values": rows}}
    return {
        "title": {
            "text": "theta_sft_T + lambda v, asked about T",
            "subtitle": "RL never saw T. 0: SFT only. Crosses: noise of the norm of v, v shuffled",
        },
        "width": 420, "height": 240,
        "layer": [
            {**base, "mark": {"type": "errorband", "extent": "stdev", "opacity": 0.2, "clip": True},
             "encoding": {"x": x, "y": y, "color": colour(results)}},
            {**base, "mark": {"type": "line", "point": True},
             "encoding": {"x": x, "y": {**y, "aggregate": "mean"}, "color": colour(results)}},
            {"data": {"values": noise},
             "mark": {"type": "point", "shape": "cross", "size": 90, "filled": True},
             "encoding": {"x": x, "y": y, "color": colour(results)}},
        ],
    }  # fmt: skip


def _arms(results: Results, arms: Sequence[str]) -> Spec:
    rows = [
        {"domain": domain, "arm": NAMES.get(arm, arm), "exact": value}
        for domain in results.domains
        for arm in arms
        if domain in results.where(arm)
        for value in results.exact(domain, arm).values
    ]
    y = {"field": "arm", "type": "nominal", "title": None,
         "sort": [NAMES.get(arm, arm) for arm in arms]}  # fmt: skip
    x = quantity("exact", "exact match on T", scale={"domain": [0, 1]})
    return {
        "title": "Every seed (dots) and the mean (bars)",
        "data": {"values": rows},
        "facet": {"column": {"field": "domain", "type": "nominal", "title": None,
                             "sort": list(results.domains)}},
        "spec": {
            "width": 260, "height": {"step": 20},
            "layer": [
                {"mark": {"type": "bar", "opacity": 0.35, "height": 12},
                 "encoding": {"y": y, "x": {**x, "aggregate": "mean"},
                              "color": {**colour(results), "legend": None}}},
                {"mark": {"type": "point", "filled": True, "size": 22, "opacity": 0.8},
                 "encoding": {"y": y, "x": x, "color": {**colour(results), "legend": None}}},
            ],
        },
    }  # fmt: skip


def _layers(results: Results) -> Spec:
    """Cosine by layer and module, mean over seeds: v against SFT, beside SFT against SFT."""
    domain = results.domains[0]
    titles = {"v, SFT on T": "round-1/skill", "SFT on S, SFT on T": "round-1/sft"}
    sums: dict[tuple[str, str, str], list[float]] = {}
    for title, name in titles.items():
        for report in results.angles:
            for row in find_pair(report, f"{domain}/{name}", f"{domain}/sft_t")["tensors"]:
                if row["cosine"] is None:
                    continue
                layer, module = _place(row["name"])
                sums.setdefault((title, layer, module), []).append(row["cosine"])
    rows = [{"pair": pair, "layer": layer, "module": module, "cosine": sum(v) / len(v)}
            for (pair, layer, module), v in sums.items()]  # fmt: skip
    text = [row | {"shown": f"{row['cosine']:+.2f}"} for row in rows]
    x = {"field": "module", "type": "nominal", "title": None, "sort": MODULES,
         "axis": {"labelAngle": -40}}  # fmt: skip
    y: Spec = {"field": "layer", "type": "nominal", "title": "layer"}
    layers = {row["layer"] for row in rows}
    few = len(layers) < 9  # of more there is no room for numbers
    if not few:
        y["sort"] = sorted(layers, key=lambda one: (not one.isdigit(), len(one), one))
    scale = {"domain": [-1, 1], "domainMid": 0, "range": ["#0b4d94", "#f4f4f4", "#a11226"]}
    numbers = {"mark": {"type": "text", "fontSize": 10}, "encoding": {
        "x": x, "y": y, "text": {"field": "shown", "type": "nominal"},
        "color": {"condition": {"test": "abs(datum.cosine) > .6", "value": "white"},
                  "value": "#333"}}}  # fmt: skip
    return {
        "title": {
            "text": "Cosine of two updates by layer and module",
            "subtitle": f"{domain}, mean over seeds: v of RL on S, and two SFT updates"
            " as the control",
        },
        "data": {"values": text},
        "facet": {"row" if few else "column": {
            "field": "pair", "type": "nominal", "title": None, "sort": list(titles),
            "header": {"labelOrient": "top", "labelAnchor": "start"}}},
        "spec": {
            "width": {"step": 42 if few else 22}, "height": {"step": 26 if few else 14},
            "layer": [
                {"mark": "rect", "encoding": {"x": x, "y": y,
                 "color": quantity("cosine", "cosine", scale=scale)}},
                *([numbers] if few else []),
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


def _forgetting(results: Results, probed: Sequence[str]) -> Spec:
    rows = [
        {"domain": domain, "arm": NAMES.get(arm, arm), "kl": kl, "exact": exact}
        for domain in results.domains
        for arm in probed
        if domain in results.where(arm, kl=(arm,))
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
                             "sort": list(results.domains)}},
        "spec": {
            "width": 260, "height": 220,
            "mark": {"type": "point", "filled": True, "size": 50, "opacity": 0.85},
            "encoding": {
                "x": quantity("kl", "KL from the base, nats a token", axis={"tickCount": 5}),
                "y": quantity("exact", "exact match on T", scale={"domain": [0, 1]}),
                "color": {"field": "arm", "type": "nominal", "title": None,
                          "scale": {"scheme": "tableau10"},
                          "sort": [NAMES.get(arm, arm) for arm in probed]},
                "shape": {"field": "arm", "type": "nominal", "legend": None,
                          "sort": [NAMES.get(arm, arm) for arm in probed]},
            },
        },
    }  # fmt: skip
