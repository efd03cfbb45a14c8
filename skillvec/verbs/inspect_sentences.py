"""What inspect says, as lines of text."""

from typing import Any

from skillvec.analysis.wording import count_files, human_bytes, human_count
from skillvec.report import Report
from skillvec.verbs.phrases import Facts, say_dtypes, say_sampled, say_source


def say_inspect(report: Report) -> list[str]:
    """Return what a file or folder is."""
    facts = report.facts
    said = [f"{facts['kind']} {facts['path']}"]
    if facts["kind"] == "vector":
        return said + _say_manifest(facts) + _say_content(facts)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    said.append(
        f"  {facts['model_type'] or 'no config'}, {human_count(facts['numel'])} values in"
        f" {len(report.ledger)} tensors ({dtypes}), {human_bytes(facts['nbytes'])} in"
        f" {count_files(facts['files'])}"
    )
    if facts["kind"] == "model" and facts["model_type"] is not None:
        tied = {True: "yes", False: "no", None: "unknown"}[facts["ties_embeddings"]]
        said.append(f"  embeddings tied: {tied}")
    if "recipe" in facts:
        recipe = facts["recipe"]
        said.append(
            f"  {recipe['target']['ref']} + {recipe['lam']:g} * {say_source(recipe['vector'])}"
        )
    return said


def _say_manifest(facts: Facts) -> list[str]:
    """Return identity and origin of a vector."""
    said = [f"  {facts['formula']}, made by {facts['tool']}:\n  {facts['command']}"]
    for side in ("tuned", "base"):
        if facts[side]:
            ref, revision = facts[side]["ref"], facts[side]["revision"] or ""
            at = f"@{revision[:12]}" if revision not in ref else ""  # of the Hub: it says it itself
            said.append(
                f"  {side:8} {ref}{at}"
                f" ({facts[side]['model_type'] or 'no config'}, {say_dtypes(facts[side])})"
            )
    for parent in facts["parents"]:
        said.append(f"  parent   {parent['ref']} ({parent['identity'][:12]})")
    labels = {"method": facts["training"]["method"], "licence": facts["license"],
              "notes": facts["training"]["notes"]}  # fmt: skip
    for label, text in labels.items():
        if text:
            said.append(f"  {label:8} {text}")
    said.append(f"  identity {facts['identity']}, family {facts['base']['family'][:12]}")
    return said


def _say_content(facts: Facts) -> list[str]:
    """Return sizes and norms of a vector: with its origin and the ledger's head one screen."""
    said = []
    files = f" in {len(facts['files'])} files" if len(facts["files"]) > 1 else ""
    said.append(
        f"  {human_count(facts['numel'])} values, {100 * facts['density']:.3g} % changed, norm"
        f" {facts['norm']:.5g}, {human_bytes(facts['nbytes'])}{files}"
    )
    codecs = (
        f"{held['tensors']} {codec} ({human_bytes(held['nbytes'])})"
        for codec, held in sorted(facts["codecs"].items())
    )
    said.append(f"  stored   {', '.join(codecs)}")
    exact = facts["exactness"]
    said.append(
        f"  exact    {exact['claim']}, {exact['exceptions']} fp32 exceptions,"
        f" {exact['replacements']} replacements, {exact['unrestored']} not restored"
    )
    if exact["claim"] == "lossy":
        said.append(f"  lossy    {', '.join(['coarsen', *_say_coarse(facts['recipe'])])}")
        if "kept" in facts:
            said.append(f"           keeps {100 * facts['kept']:.3g} % of its matrices' norm^2")
    if facts["nonfinite"]:
        who = "which only the exact base gets" if facts["tuned"] else "which nobody gets"
        most = "" if facts["tuned"] else "at most "
        said.append(f"  finite   but for {most}{facts['nonfinite']} values, {who}")
    top = (f"{layer['name']} {layer['norm']:.3g}" for layer in facts["layers"][:3])
    said.append(f"  largest  {', '.join(top)}")
    if "verdict" in facts:
        verdict = facts["verdict"]
        said.append(f"  verdict  on {facts['target']}: {verdict}{say_sampled(verdict)}")
    return said


def _say_coarse(recipe: Any) -> list[str]:
    """Return how coarse a copy is, by a recipe that anyone may have written."""
    whole = recipe if isinstance(recipe, dict) else {}
    shares = whole.get("vectors")
    held = (whole, *(shares if isinstance(shares, list) else ()))
    given = [one.get("parameters") for one in held if isinstance(one, dict)]
    return [
        f"{name} {str(value)[:20].removesuffix('.0')}"
        for one in given if isinstance(one, dict)
        for name in ("rank", "bits", "others") if (value := one.get(name)) is not None
        if isinstance(value, int | float) or value in ("keep", "drop", "split")
    ]  # fmt: skip
