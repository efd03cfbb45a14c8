"""Cards: what README.md says of a vector or a merged model on the Hub, made of its own header.

Hides how a card is laid out and renewed. What is generated stands between two comments and in
metadata keys whose digests the first comment holds, so a renewal tells its own values from a
user's: text and values that a user wrote stay as they are. A checkpoint is named only where it is
known to be on the Hub, with its commit; a path of a disk appears nowhere. Strings of the header
are hostile. Refuses a README.md whose metadata or comments cannot be understood.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from math import hypot, prod
from typing import Any, NamedTuple

from skillvec.errors import printable
from skillvec.ops.merge_parameters import CHOICES
from skillvec.ops.names import kind_of, layer_of, natural_order
from skillvec.vectors.kinds import TAKEN
from skillvec.verbs.card_file import (
    digest_text,
    enclose,
    make_card,
    parse_card,
    set_keys,
    split_card,
)

NAMED = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@[^@]+)?", re.ASCII)
SCHEMED = re.compile(
    r"hf://(\w[\w.-]*/\w[\w.-]*)(?:@(refs/(?:pr|convert)/\d+|[\w.-]+))?(?:/.*)?", re.ASCII
)
IN_CACHE = re.compile(r"models--(\w[\w.-]*?)--(\w[\w.-]*)[/\\]snapshots(?:[/\\]|$)", re.ASCII)
LICENSE = ("license", "license_name", "license_link")
INHERITED = (*LICENSE, "language", "pipeline_tag", "library_name")
BINS, ROWS = 8, 20  # groups of the layers of one kind, and rows of the table
CLAIMS = {
    "bitwise": "base + 1 * vector restores tuned bit for bit",
    "partial": "base + 1 * vector restores tuned but for {unrestored} values or integer tensors",
    "rounded": "the differences are rounded, so tuned comes back nearly",
    "combined": "the result of an operator, rounded once",
    "lossy": "a coarser copy, by the operator coarsen: near what the whole vector does, and not it",
    "adapter": "what the adapter adds to its base, s B A, summed in fp64 and rounded once",
}
VECTOR = """# {name}

A skill vector: a difference of weights, to be added to a model. It is no model itself:
`from_pretrained` does not load it. The method is PaST, [arXiv 2601.11258](https://arxiv.org/abs/2601.11258).

{facts}

### How to apply it

```bash
skillvec inspect {name} --target TARGET   # the verdict on your model
skillvec apply TARGET {name} -o OUT --lam 1
```

TARGET is a model with the tensors of the base ({model_type}, family `{family}`). On the exact
base, lambda 1 gives what the claim above says. On another model of the family, such as one trained on new
knowledge, the skill may transfer. Other shapes are refused, and equal shapes prove nothing:
`inspect` compares weights and says which of these yours is.

### How it was made

```bash
{command}
```

By {tool}; `skillvec verify` computes it again and compares.

### Norms and density

{norms}

### What to keep in view

- Rounding to the target's dtype can swallow small differences: `apply` reports the realised gain,
  the part of lambda that arrived.
- Compare with the target alone, trained on its knowledge without the vector (SFT only): what that
  model reaches by itself is no merit of the vector.
- Norms say where the change is, not that a skill transfers: measure on your own task."""  # noqa: E501
MERGED = """# {name}

A merged model: target + {lam!r} * skill vector, in fp32 with one rounding. It loads as the target
does. The method is PaST, [arXiv 2601.11258](https://arxiv.org/abs/2601.11258).

{facts}

### How it was made

```bash
{command}
skillvec verify OUT   # computes it again and compares, bit for bit
```

### What to keep in view

- Rounding to the target's dtype can swallow small differences: the realised gain says what part
  of lambda arrived.
- Nothing was trained here: compare with the target alone (SFT only) on your own task before you
  credit the vector."""


class HubModel(NamedTuple):
    """A repository and the commit (or the revision as written) that was read."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


def hub_model(ref: str, revision: str | None = None) -> HubModel | None:
    """Return what a reference names on the Hub, None where it may be a path of a disk.

    `runs/sft` looks like a name on the Hub: only a recorded commit or hf:// tells.
    """
    if found := IN_CACHE.search(ref):
        return HubModel(f"{found[1]}/{found[2]}", revision)
    if found := SCHEMED.fullmatch(ref):
        return HubModel(found[1], revision or found[2])
    name, _, commit = ref.partition("@")
    if re.fullmatch("[0-9a-f]{40}", commit):
        ref, revision = name, commit
    found = NAMED.fullmatch(ref) if revision else None
    return HubModel(found[1], revision) if found else None


def vector_card(
    manifest: Mapping[str, Any],
    *,
    name: str,
    files: Mapping[str, int],
    existing: str | None = None,
    license: Mapping[str, str] | None = None,
) -> str:
    """Return the README.md of a vector, of its checked manifest.

    `name` is its repository, `files` its files with their bytes, `existing` the README.md to
    renew, `license` the base's metadata of licence, used where the manifest names none. Raises
    UsageError for an `existing` that cannot be understood.
    """
    base, tuned, training = manifest["base"], manifest["tuned"], manifest["training"]
    said, recipe = manifest["exactness"], manifest["recipe"] or {}
    adapter = not tuned and not recipe
    claim = CLAIMS["adapter" if adapter else said["claim"]].format(unrestored=said["unrestored"])
    if tuned and (manifest["include"] or manifest["exclude"] or "rows" in manifest):
        claim += ", in the tensors and rows that were taken"
    if "kept" in manifest:
        claim += f"; its factors keep {manifest['kept']:.3g} of the squared norm of their matrices"
    dtypes = ", ".join(sorted({entry["dtype"] for entry in manifest["tensors"].values()}))
    rows = [("base", _side(base)), *([("tuned", _side(tuned))] if tuned else [])]
    how = "s B A of a LoRA adapter" if adapter else f"{_operator(recipe)} of vectors"
    rows.append(("how", "tuned - base" if tuned else how))
    weights = _weights(recipe, len(manifest["parents"]))
    for parent, weight in zip(manifest["parents"], weights, strict=True):
        where = _where(hub_model(parent["ref"]), f"a local {'adapter' if adapter else 'vector'}")
        row = ("vector", f"{weight} * {where}, identity `{parent['identity']}`")
        rows.append(("adapter", where) if adapter else row)
    lost = [entry["nonfinite"] for entry in manifest["tensors"].values() if "nonfinite" in entry]
    if lost:
        words = f"{sum(lost):,} values of {len(lost)} tensors have no finite difference"
        rows.append(("not finite", f"{words}: only the exact base gets tuned's NaN or infinities"))
    rows += [("training", _line(training["method"] or "not stated"))]
    rows += [("notes", _line(training["notes"], 2000))] if training["notes"] else []
    rows += [("claim", f"{claim} (stored as {dtypes})"), ("identity", f"`{manifest['identity']}`")]
    rows += [("file", f"{_span(file)}, {nbytes:,} bytes") for file, nbytes in files.items()]
    models = [hub_model(base["ref"], base["revision"])]
    models += [hub_model(parent["base"]) for parent in manifest["parents"]]
    method = re.findall(r"^[a-z0-9][a-z0-9-]{0,39}$", (training["method"] or "").lower())
    data = _licensed(manifest["license"]) or dict(license or {})
    body = VECTOR.format(
        name=name,
        facts=_table(("", ""), rows),
        model_type=_line(base["model_type"] or "of unknown type", 60),
        family=base["family"],
        command=_command(manifest),
        tool=_line(manifest["tool"]),
        norms=_norms(manifest["tensors"]),
    )
    tags = {"library_name": "skillvec", "tags": ["skill-vector", "task-arithmetic", *method]}
    card = make_card(data | tags | _lineage("adapter", models), body)
    return renewed(existing, card) if existing else card


def merged_card(
    recipe: Mapping[str, Any],
    *,
    name: str,
    inherited: str | None = None,
    revisions: Mapping[str, str | None] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Return the README.md of a merged model, of the checked recipe in its header.

    `inherited` is the target's: its text stays, below, and so do licence, language and task.
    `revisions` maps references of the recipe to their commits on the Hub, `facts` are those of
    apply's report. Raises UsageError where `inherited` cannot be understood.
    """
    said, target, facts = recipe["vector"], recipe["target"]["ref"], facts or {}
    keys = ("ref", "tuned", "base")
    refs = [target, *(part[k] for part in said.get("parts", [said]) for k in keys if k in part)]
    known = {ref: hub_model(ref, (revisions or {}).get(ref)) for ref in refs}
    rows = [("target", _where(known[target], "a local checkpoint"))]
    parts = said.get("parts", [said])
    weights = _weights(said["recipe"], len(parts)) if "recipe" in said else []
    for part, weight in zip(parts, [f"{weight} * " for weight in weights] or [""], strict=True):
        for key in (key for key in keys if key in part):
            where = _where(known[part[key]], "a local file")
            rows.append(("vector", weight + where) if key == "ref" else (key, where))
    rows += [("combined by", _operator(said["recipe"]))] if "recipe" in said else []
    rows += [("verdict", _line(facts["verdict"]))] if facts.get("verdict") else []
    if facts.get("gain") is not None:
        told = f"{facts['gain']:.3f} (cosine {facts['cosine'] or 0:.3f})"
        rows.append(("realised gain", told))
    lost = facts.get("nonfinite", {}).get("lost", 0)
    if lost or recipe["request"].get("allow_nonfinite"):
        count = f"{lost:,} values" if lost else "values"
        rows.append(("not finite", f"{count} that are NaN, infinite or without a finite difference"
                     " were let through"))  # fmt: skip
    words: list[Any] = [known[target] or "TARGET"]
    words += [known[said["ref"]] or "VECTOR"] if "ref" in said else []
    options = {key: known[said[key]] or key.upper() for key in ("tuned", "base") if key in said}
    options |= recipe["request"] | {"lam": recipe["lam"]}
    if "recipe" in said:
        numbers, flags = _flags(said["recipe"])
        for part, number in zip(parts, numbers, strict=bool(numbers)):
            sides = [str(known[part[k]] or k.upper()) for k in ("tuned", "base") if k in part]
            at = known[part["ref"]] if "ref" in part else "::".join(sides)
            words.append(f"{at or 'VECTOR'}={number}")
        options |= flags
    command = _shell("apply", words, options, "OUT")
    data: dict[str, Any] = {"library_name": "transformers"}
    below = ""
    if inherited is not None:
        card = parse_card(inherited)
        data |= {key: card.data.get(key) for key in INHERITED if card.data.get(key)}
        before, _, after, _ = split_card(card.text)  # the target may have such a part of its own
        below = f"\n{(before + (after or '')).lstrip()}"
    data |= {"tags": ["skillvec", "merge", "task-arithmetic"]}
    data |= _lineage("merge", [known[ref] for ref in refs])
    body = MERGED.format(name=name, lam=recipe["lam"], facts=_table(("", ""), rows),
                         command=command)  # fmt: skip
    return make_card(data, body) + below


def renewed(existing: str, made: str) -> str:
    """Return `existing` with the generated part and keys of `made`; what a user wrote stays."""
    text = existing.removeprefix("\ufeff")
    ending = "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"
    card, fresh = parse_card(text), parse_card(made)
    before, _, after, marks = split_card(card.text)
    _, block, _, names = split_card(fresh.text)
    held = card.data.to_dict()
    kept = {key for key in held if marks.get(key) != digest_text(card.data.get(key))}
    kept |= set(LICENSE) if kept & set(LICENSE) else set()
    ours = {key: fresh.data.get(key) for key in names if key not in kept}
    if before.strip():
        block = re.sub(r"\A\n# .*\n\n", "\n", block)
    if after is None:
        before, after = before + (2 * ending if before.strip() else ending), ending
    head = set_keys(text[: len(text) - len(card.text)], card, ours, set(held) - kept, ending)
    return head + before + enclose(ours, block).replace("\n", ending) + (after or "")


# --------------------------------------------------------------------------------- parts of a text


def _line(text: object, length: int = 200) -> str:
    """Return a header's string as one harmless line of Markdown."""
    line = " ".join(printable(str(text)).split())[:length]
    return re.sub(r"[&<>|`*_\[\]!\\]", lambda sign: f"&#{ord(sign[0])};", line)


def _span(text: object) -> str:
    """Return a header's string as a span of code."""
    line = " ".join(printable(str(text)).split())[:200]
    return "`" + re.sub("[`|]", "'", line) + "`"


def _where(model: HubModel | None, otherwise: str) -> str:
    return _span(model) if model else otherwise


def _side(side: Mapping[str, Any]) -> str:
    where = _where(hub_model(side["ref"], side["revision"]), "a local checkpoint")
    kind, dtypes = _line(side["model_type"] or "unknown type", 60), map(_line, side["dtypes"])
    return f"{where} ({kind}; {'+'.join(dtypes)}; family `{side['family']}`)"


def _operator(recipe: Mapping[str, Any]) -> str:
    """Return an operator with its numbers and choices; other parameters may hold paths."""
    given = recipe.get("parameters")
    numbers = {"seed": recipe.get("seed")} | (given if isinstance(given, dict) else {})
    shown = [
        f", {_line(k, 40)} {v if isinstance(v, str) else f'{v:g}'}"
        for k, v in numbers.items() if isinstance(v, int | float) or v in CHOICES.get(k, ())
    ]  # fmt: skip
    return _line(recipe.get("op", "linear"), 40) + "".join(shown)


def _flags(recipe: Mapping[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Return the weights of a recipe and its options, no weights where it takes a file to say."""
    given, shares = recipe.get("parameters") or {}, recipe["vectors"]
    if not all(isinstance(s, dict) and set(s) <= {"vector", "weight"} for s in shares):
        return [], {"recipe": "RECIPE"}
    numbers = [share.get("weight", 1) for share in shares]
    told = {key: v for key, v in dict(given).items() if v not in CHOICES.get(key, ())}
    if not all(isinstance(n, int | float) for n in (*numbers, *told.values())):
        return [], {"recipe": "RECIPE"}
    param = [f"{key}={value}" for key, value in given.items()]
    return numbers, {"op": recipe.get("op", "linear"), "param": param}


def _weights(recipe: Mapping[str, Any], count: int) -> list[str]:
    shares = recipe.get("vectors")
    shares = shares if isinstance(shares, list) else []
    given = [share.get("weight", 1) if isinstance(share, dict) else None for share in shares]
    given += [None] * count
    shown = [
        f"{weight:g}" if isinstance(weight, int | float) else "(by tensor)" for weight in given
    ]
    return shown[:count]


def _command(manifest: Mapping[str, Any]) -> str:
    """Return the command that gives this vector, with placeholders for paths of a disk."""
    options: dict[str, Any] = {key: manifest[key] for key in ("dtype", "codec")}
    verb = "".join(manifest["command"].split()[1:2])
    if verb in ("diff", "import-patch") and not manifest["recipe"]:
        base, tuned = manifest["base"], manifest["tuned"]
        first = hub_model(tuned["ref"], tuned["revision"]) if tuned else None
        first = first or next((hub_model(parent["ref"]) for parent in manifest["parents"]), None)
        role = "PATCH" if verb == "import-patch" else "TUNED" if tuned else "ADAPTER"
        words = [first or role, hub_model(base["ref"], base["revision"]) or "BASE"]
        options |= {key: manifest[key] for key in (*TAKEN, "allow_nonfinite") if key in manifest}
        return _shell(verb, words, options, "VECTOR")
    if manifest["recipe"]:
        return _shell("combine", [], options | {"recipe": "RECIPE"}, "VECTOR")  # the manifest's
    return _shell("combine", ["VECTOR"], options, "OUT")


def _shell(verb: str, words: Sequence[Any], options: Mapping[str, Any], output: str) -> str:
    plain = {"dtype": None, "rounding": "nearest", "seed": 0}
    line = ["skillvec", verb, *map(str, words)]
    for key, value in options.items():
        if key not in plain or value != plain[key]:
            for item in value if isinstance(value, list) else [value]:
                line += [f"--{key.replace('_', '-')}", *([] if item is True else [str(item)])]
    return " ".join(printable(shlex.join([*line, "-o", output])).split("\n"))


def _norms(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of norms and density: layers in up to eight groups of each kind."""
    layers: dict[str, dict[str, list[str]]] = {}
    for name in tensors:
        layer = layer_of(name)
        kind = layer.rpartition(".")[0] if layer else kind_of(name)
        layers.setdefault(kind, {}).setdefault(layer or kind, []).append(name)
    groups = []
    for held in layers.values():
        keys = sorted(held, key=natural_order)
        step = -(-len(keys) // BINS)
        for some in (keys[begin : begin + step] for begin in range(0, len(keys), step)):
            label = some[0] + (f" to {some[-1].rpartition('.')[2]}" if len(some) > 1 else "")
            groups.append((_span(label), [name for key in some for name in held[key]]))
    if rest := groups[ROWS:]:
        groups[ROWS:] = [(f"{len(rest)} more", [name for _, names in rest for name in names])]
    total = hypot(*(entry["norm"] for entry in tensors.values())) or 1.0
    rows = []
    for label, names in [*groups, ("**all**", list(tensors))]:
        entries = [tensors[name] for name in names]
        numel = sum(prod(entry["shape"]) for entry in entries)
        changed = sum(entry["changed"] for entry in entries) / max(1, numel)
        norm = hypot(*(entry["norm"] for entry in entries))
        share = f"{(norm / total) ** 2:.1%}"
        rows.append((label, len(names), f"{numel:,}", f"{changed:.2%}", f"{norm:.4g}", share))
    return _table(("tensors of", "tensors", "values", "changed", "norm", "share of norm²"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --------------------------------------------------------------------------------------- metadata


def _licensed(text: str | None) -> dict[str, str]:
    """Return a licence as the Hub's keys: one word is an id, other words are a name."""
    word = (text or "").strip().lower()
    if not word or re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", word):
        return {"license": word} if word else {}
    return {"license": "other", "license_name": " ".join(word.split())[:200]}


def _lineage(relation: str, models: Iterable[HubModel | None]) -> dict[str, Any]:
    names = list(dict.fromkeys(model.repo for model in models if model))
    return {"base_model": names, "base_model_relation": relation} if names else {}
