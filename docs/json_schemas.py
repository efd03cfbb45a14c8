"""The JSON Schemas of what `skillvec VERB --json` prints: docs/schemas/VERB.json and error.json.

    python docs/json_schemas.py     # writes them

What the program has as types (the manifest, the facts of orthogonality) and as a table (its
statistics) is read from there; the rest of each report stands here. Forms are closed: a key that is
not here is an error, so that tests find one that nobody has described. docs/json.md says how a
reader may use them.
"""

import json
import re
from collections.abc import Sequence as AnySequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NotRequired, Union, get_args, get_origin, get_type_hints

from skillvec import errors
from skillvec.analysis import angle_report, sweep_report
from skillvec.analysis.statistics_table import FORECAST, PAIRS, VECTORS, Statistic
from skillvec.checkpoints.fingerprint import ModelFacts
from skillvec.cli.screen import FORMAT_VERSION
from skillvec.ops.codecs import CODECS
from skillvec.ops.merge_methods import OPERATORS
from skillvec.trials import choosing
from skillvec.vectors import manifest

FOLDER = Path(__file__).parent / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]

# --------------------------------------------------------------------------------- parts of a form

TEXT: Schema = {"type": "string"}
WORDS: Schema = {"type": "array", "items": TEXT}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
SIZE: Schema = {"type": "number", "minimum": 0}
DIGEST: Schema = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
DTYPE: Schema = {"type": "string", "pattern": "^[A-Z][A-Z0-9_]*$"}  # as safetensors calls it
SHAPE: Schema = {"type": "array", "items": COUNT}


def closed(required: Schema, optional: Schema | None = None, **more: Any) -> Schema:
    """Return an object that has these keys, perhaps those, and no others."""
    found: Schema = {"type": "object", "properties": {**required, **(optional or {})}}
    return found | {"required": [*required], "additionalProperties": False} | more


def by_name(values: Schema, names: AnySequence[str] = ()) -> Schema:
    """Return an object from names to values."""
    of = {"propertyNames": {"enum": [*names]}} if names else {}
    return {"type": "object", "additionalProperties": values} | of


def several(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items} | more


def maybe(schema: Schema) -> Schema:
    """Return a form that may be null."""
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return schema | {"type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*words: str) -> Schema:
    return {"enum": [*words]}


def says(text: str, schema: Schema) -> Schema:
    return {"description": text} | schema


def together(*keys: str) -> Schema:
    """Return what says that where the first key is, the others are."""
    return {"dependentRequired": {keys[0]: [*keys[1:]]}}


def named(name: str) -> Schema:
    """Return a reference to a form of `SHARED`, which `headed` puts where it is used."""
    return {"$ref": f"#/$defs/{name}"}


# ------------------------------------------------------------------------------ forms out of types


def of_type(hint: Any) -> Schema:
    """Return the form of what a type says of JSON, as `skillvec.files.typed_json` reads it."""
    origin, given = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is NotRequired:
        return of_type(given[0])
    if origin is Annotated:
        return _of_annotated(*given[:2])
    if origin in (Union, UnionType):
        kinds = [kind for kind in given if kind is not type(None)]
        found = NUMBER if set(kinds) == {int, float} else of_type(kinds[0])
        return maybe(found) if type(None) in given else found
    if origin in (list, AnySequence):
        return several(of_type(given[0]))
    if origin is dict:
        return by_name(of_type(given[1]))
    if hasattr(hint, "__required_keys__"):
        hints = get_type_hints(hint, include_extras=True)
        forms = {key: of_type(kind) for key, kind in hints.items()}
        required = {key: form for key, form in forms.items() if key in hint.__required_keys__}
        return closed(required, {key: forms[key] for key in forms if key not in required})
    return {str: TEXT, int: {"type": "integer"}, float: NUMBER, bool: FLAG}[hint]


def _of_annotated(kind: Any, allowed: Any) -> Schema:
    if isinstance(allowed, re.Pattern):
        return {"type": "string", "pattern": f"^{allowed.pattern}$"}
    if isinstance(allowed, range):
        return {"type": "integer", "minimum": allowed.start, "maximum": allowed.stop - 1}
    if isinstance(allowed, tuple):
        count = len(allowed)
        items = [of_type(one) for one in allowed]
        return {"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}
    return of_type(kind)


# -------------------------------------------------------------------------- what reports have alike

MODEL = named("model")
CHECKPOINT = says("A checkpoint: where it lies, its dtypes, how its weights are stored.", closed({
    "ref": says("As it was given.", TEXT), "path": TEXT,
    "dtypes": says("Tensors of each dtype.", by_name(COUNT)),
    "revision": says("The commit on the Hub.", maybe(TEXT)), "format": TEXT,
    "stored": says("How weights are stored that are computed when they are read.", WORDS),
    "notes": WORDS,
}))  # fmt: skip
STREAM = closed({
    "fetched": COUNT, "fetched_again": COUNT, "nbytes_fetched": COUNT, "most_files": COUNT,
    "most_nbytes": COUNT, "wide": WORDS,
})  # fmt: skip
PLANNED = {
    "nbytes_read": COUNT, "nbytes_written": says("At most; of a vector often less.", COUNT),
    "files": WORDS, "side_files": WORDS, "engine": one_of("threads", "serial", "ray"),
    "workers": {"type": "integer", "minimum": 1}, "memory_nbytes": COUNT,
    "kernels": says("Whose code computes: an instruction set, or numpy.", TEXT),
}  # fmt: skip
FETCHED = {"nbytes_fetched": COUNT, "fetched": COUNT, "stream": STREAM}
LAYOUT = says("How tensors of another layout fit, by name: text for people.", by_name(TEXT))
FREE = says("Of a dry run: bytes free on the disk of the output.", maybe(COUNT))
SIDES = ("tuned", "base", "target", "output", "lost")
NONFINITE = says("Values that are NaN or infinite, by side; lost ones have no finite delta.",
                 by_name(COUNT, SIDES))  # fmt: skip
RESUMED = says("Tensors taken over from a run that was cut off.", COUNT)
VERDICTS = ("exact base", "same family", "same shapes, unknown lineage")
FREE_FORM = says("A recipe of docs/operators.md.", {"type": "object"})
TAKEN = {"include": WORDS, "exclude": WORDS}
RENAMED = {"rename": WORDS, "rows": one_of("strict", "common", "skip")}
CHOSEN = {"dtype": TEXT, **TAKEN, **RENAMED}
SOURCE = says("A vector as a recipe names it.", {"anyOf": [
    closed({"ref": TEXT, "digest": TEXT}, {"rename": WORDS}),
    closed({"tuned": TEXT, "base": TEXT}, CHOSEN),
    closed({"recipe": FREE_FORM, "parts": several(named("source"))}),
]})  # fmt: skip
TENSOR = {"dtype": DTYPE, "shape": SHAPE, "note": says("Text for people.", TEXT)}
MATRICES = says("Matrices that an operator took apart, and what is kept of each vector's.", closed({
    "tensors": COUNT, "least_rank": COUNT, "most_rank": COUNT,
    "kept_energy": several(maybe(NUMBER)),
}))  # fmt: skip
OF_MATRICES = {"ranks": several(maybe(COUNT)), "kept_energies": several(maybe(NUMBER))}


def line(statuses: AnySequence[str], **optional: Schema) -> Schema:
    """Return a line of `tensors`: of each tensor of each input, what became of it."""
    return closed({"name": TEXT, "status": one_of(*statuses)}, TENSOR | optional)


def report(
    verb: str, about: str, statuses: AnySequence[str], required: Schema,
    optional: Schema | None = None, of_line: Schema | None = None, **more: Any,
) -> Schema:  # fmt: skip
    """Return the schema of a verb's report."""
    common = {
        "verb": {"const": verb},
        "format_version": {"const": FORMAT_VERSION},
        "counts": says("Tensors by status.", by_name({"type": "integer", "minimum": 1}, statuses)
                       if statuses else closed({})),
        "warnings": says("Sentences for people.", WORDS),
        "tensors": several(line(statuses, **(of_line or {}))) if statuses else {"maxItems": 0},
    }  # fmt: skip
    return headed(verb, about, closed(common | required, optional, **more))


def headed(name: str, about: str, schema: Schema) -> Schema:
    head = {"$schema": DIALECT, "$id": f"urn:skillvec:json:{FORMAT_VERSION}:{name}"}
    found = head | {"title": f"skillvec {name} --json", "description": about} | schema
    used = {key: form for key, form in SHARED.items() if f'"#/$defs/{key}"' in json.dumps(schema)}
    return found | ({"$defs": used} if used else {})


# ---------------------------------------------------------------------------------- vectors, models

DONE = ("nbytes", "codecs", "numel", "changed", "density", "norm", "exactness", "is_whole")


def stored(verb: str, about: str) -> Schema:
    """Return the report of a verb that writes a vector."""
    required = {"formula": TEXT, "output": TEXT, "dtype": TEXT, "codec": TEXT, **PLANNED}
    optional = {
        "tuned": MODEL, "base": MODEL, "layout": LAYOUT, **FETCHED, "nbytes_free": FREE,
        "nbytes": COUNT, "codecs": by_name(COUNT, CODECS), "numel": COUNT, "changed": COUNT,
        "density": SHARE, "norm": SIZE, "exactness": EXACTNESS, "is_whole": FLAG,
        "nonfinite": NONFINITE, "resumed": RESUMED, "matrices": MATRICES,
    }  # fmt: skip
    statuses = ("delta", "unchanged", "equal", "differs", "excluded", "tied", "left out",
                "passed through")  # fmt: skip
    of_line = {
        "numel": COUNT, "changed": COUNT, "norm": SIZE, "codec": one_of(*CODECS), "nbytes": COUNT,
        "exceptions": COUNT, "replacements": COUNT, "unrestored": COUNT, "nonfinite": NONFINITE,
        **OF_MATRICES,
    }  # fmt: skip
    return report(verb, about, statuses, required, optional, of_line, **together(*DONE))


EXACTNESS = of_type(manifest.Claim)
EXACTNESS["properties"]["claim"] = one_of(*manifest.CLAIMS)
EXACTNESS["properties"] |= dict.fromkeys(("exceptions", "replacements", "unrestored"), COUNT)


def applied() -> Schema:
    gain = {"gain": maybe(NUMBER), "cosine": maybe(NUMBER)}
    required = {
        "formula": TEXT, "target": MODEL, "vector": named("source"), "name": TEXT,
        "lineage": TEXT, "output": TEXT, "lam": NUMBER, "dtype": maybe(TEXT),
        "rounding": one_of("nearest", "stochastic"), "seed": maybe(COUNT),
        "verdict": one_of(*VERDICTS), "left_behind": WORDS, "old_weights": WORDS,
        "adapter_files": WORDS, "copied_weights": WORDS, **PLANNED,
    }  # fmt: skip
    optional = {
        "layout": LAYOUT, **FETCHED, "nbytes_free": FREE, "numel": COUNT, "changed": COUNT,
        **gain, "worst": several(closed({"name": TEXT, **gain})), "nonfinite": NONFINITE,
        "resumed": RESUMED, "verdict_sampled": FLAG, "matrices": MATRICES,
    }  # fmt: skip
    statuses = ("applied", "unchanged", "passed through", "excluded", "tied", "left out")
    of_line = {"numel": COUNT, "changed": COUNT, **gain, "nonfinite": NONFINITE, **OF_MATRICES}
    about = "A merged model: OUT = TARGET + LAM * VECTOR."
    done = together("gain", "cosine", "numel", "changed", "worst")
    return report("apply", about, statuses, required, optional, of_line, **done)


def exported() -> Schema:
    required = {
        "output": TEXT, "vector": TEXT, "base": TEXT, "form": one_of("lists", "vllm", "verl"),
        "names": one_of("files", "memory"), **PLANNED,
    }  # fmt: skip
    optional = {**FETCHED, "nbytes_free": FREE, "changed": COUNT, "nbytes": COUNT, "numel": COUNT,
                "nonfinite": NONFINITE, "resumed": RESUMED}  # fmt: skip
    statuses = ("listed", "unchanged", "passed through", "equal", "tied", "excluded", "left out")
    about = "A patch: the values that VECTOR changes in its exact base."
    return report("export-patch", about, statuses, required, optional,
                  {"changed": COUNT, "nonfinite": NONFINITE},
                  **together("changed", "nbytes", "numel"))  # fmt: skip


def extracted() -> Schema:
    required = {
        "vector": TEXT, "lineage": TEXT, "base": TEXT, "output": TEXT, "rank": maybe(COUNT),
        "energy": maybe(SHARE), "embed_lora": FLAG, "save_module": WORDS, "dtype": TEXT,
        "seed": COUNT, "device": TEXT, **PLANNED,
    }  # fmt: skip
    optional = {
        **FETCHED, "nbytes_free": FREE, "nbytes": COUNT, "norm_sq": SIZE, "kept_energy": NUMBER,
        "kept_of_held": NUMBER, "left_out_energy": NUMBER, "not_found_energy": NUMBER,
        "modules": COUNT, "least_rank": COUNT, "most_rank": COUNT, "svd_error": SIZE,
    }  # fmt: skip
    statuses = ("held", "whole", "zero", "left out", "not found", "tied", "excluded")
    of_line = {"norm_sq": SIZE, "kept_energy": maybe(NUMBER), "rank": COUNT, "svd_error": SIZE}
    about = "A LoRA adapter: the best of its rank."
    done = together("nbytes", "norm_sq", "kept_energy", "kept_of_held", "left_out_energy",
                    "not_found_energy", "modules", "least_rank", "most_rank",
                    "svd_error")  # fmt: skip
    return report("extract-lora", about, statuses, required, optional, of_line, **done)


def verified() -> Schema:
    required = {"claim": TEXT, "path": TEXT, **PLANNED}
    optional = {
        **FETCHED, "target": TEXT, "vector": TEXT, "lam": NUMBER, "tuned": TEXT, "base": TEXT,
        "verdict": one_of(*VERDICTS), "exactness": EXACTNESS, "verified": {"const": True},
        "unrestored": by_name(COUNT), "differing": WORDS, "excluded": WORDS,
        "rows": RENAMED["rows"], "nonfinite": NONFINITE, "verdict_sampled": FLAG,
    }  # fmt: skip
    statuses = ("verified", "compared", "applied", "passed through", "differing", "excluded",
                "tied", "left out", "equal")  # fmt: skip
    about = "A proof from the disk. Where it does not hold, an error of the type VerificationError."
    of_line = {"unrestored": COUNT, "nonfinite": NONFINITE}
    return report("verify", about, statuses, required, optional, of_line)


# ------------------------------------------------------------------------------------------ inspect


def inspected() -> Schema:
    """Return the schema of inspect: a form for each kind of thing, so that errors name the key."""
    about = "What a path is, by `kind`, and what it holds."
    kinds = [_vector(), *map(_weights, ("model", "adapter", "patch")), *_folders()]
    names = [kind["properties"]["kind"]["const"] for kind in kinds]
    chosen = [
        {"if": {"properties": {"kind": {"const": name}}}, "then": kind}
        for name, kind in zip(names, kinds, strict=True)
    ]
    top = {"type": "object", "properties": {"kind": one_of(*names)}, "required": ["kind"]}
    return headed("inspect", about, top | {"allOf": chosen})


def _kind(kind: str, about: str, statuses: AnySequence[str], required: Schema,
          optional: Schema | None = None, of_line: Schema | None = None) -> Schema:  # fmt: skip
    """Return the form of one kind, without the head that is that of all."""
    known = {"kind": {"const": kind}, "path": TEXT, "nbytes": COUNT}
    found = report("inspect", about, statuses, known | required, optional, of_line)
    return {key: value for key, value in found.items() if key not in ("$schema", "$id", "$defs")}


def _vector() -> Schema:
    side = of_type(ModelFacts) | {"additionalProperties": True}  # keys of a newer manifest stay
    parent = of_type(manifest.Parent) | {"additionalProperties": True}
    required = {
        "schema": {"enum": [*manifest.SCHEMAS]}, "tool": TEXT, "command": TEXT, "formula": TEXT,
        "identity": DIGEST, "dtype": TEXT, "codec": TEXT, "exactness": EXACTNESS, "base": side,
        "tuned": maybe(side), "parents": several(parent), "recipe": maybe(FREE_FORM),
        "training": of_type(manifest.Training), "license": maybe(TEXT), "tied": by_name(TEXT),
        "excluded": WORDS, "differing": WORDS, "files": WORDS, "lineage": TEXT,
        "nonfinite": COUNT, "numel": COUNT, "changed": COUNT, "density": SHARE, "norm": SIZE,
        "codecs": by_name(closed({"tensors": COUNT, "nbytes": COUNT}), CODECS),
        "layers": several(closed({"name": TEXT, "norm": SIZE})),
        "content": says("The content digests of docs/format.md, null where not known.",
                        closed({"base": maybe(DIGEST), "tuned": maybe(DIGEST)})),
    }  # fmt: skip
    optional = {"untied": by_name(TEXT), "kept": SHARE, "target": TEXT,
                "verdict": one_of(*VERDICTS)}  # fmt: skip
    of_line = {"codec": one_of(*CODECS), "nbytes": COUNT, "numel": COUNT, "changed": COUNT,
               "norm": SIZE}  # fmt: skip
    return _kind("vector", "A skill vector.", ("delta", "equal"), required, optional, of_line)


def _weights(kind: str) -> Schema:
    """Return the form of files of weights."""
    required = {
        "format": TEXT, "notes": WORDS, "files": WORDS, "numel": COUNT, "dtypes": by_name(COUNT),
        "model_type": maybe(TEXT), "architecture": maybe(TEXT), "ties_embeddings": maybe(FLAG),
        "config_digest": maybe(DIGEST), "tokenizer_digest": maybe(DIGEST),
        "family_digest": DIGEST,
    }  # fmt: skip
    optional = {
        "recipe": FREE_FORM, "digest": says("The content digest of docs/format.md.", DIGEST),
        "engine": PLANNED["engine"], "workers": PLANNED["workers"], "nbytes_read": COUNT,
    }  # fmt: skip
    required |= {
        "model": {
            "parameters": says("Floating-point values, dequantised; null where not known.",
                               maybe(COUNT)),
            "quantised": says("Tensors by the scheme that they are stored in.", by_name(COUNT)),
        },
        "adapter": {"adapter": closed({
            "method": maybe(TEXT), "rank": maybe({"type": "integer"}), "alpha": maybe(NUMBER),
            "base": maybe(TEXT),
        })},
        "patch": {"form": one_of("lists", "vllm", "verl")},
    }[kind]  # fmt: skip
    of_line = {"nbytes": COUNT, "digest": DIGEST}
    return _kind(kind, f"Files of weights: {kind}.", ("stored",), required, optional, of_line)


def _folders() -> list[Schema]:
    return [
        _kind("report", "A folder that a verb wrote for people.", (),
              {"verb_run": TEXT, "page": maybe(TEXT)}),
        _kind("unfinished", "What a run has left that was cut off, or is at work.", (),
              {"verb_run": maybe(TEXT), "output": maybe(TEXT), "tensors_done": maybe(COUNT)}),
        _kind("checkpoints", "Checkpoints of a training, the last step last.", (),
              {"checkpoints": WORDS, "newest": WORDS}),
        _kind("cache", "A folder of the Hub's cache.", (),
              {"repos": WORDS, "commits": WORDS, "newest": WORDS}),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ the Hub

SIZES = says("Bytes by file.", by_name(COUNT))


def pushed() -> Schema:
    required = {
        "kind": one_of("vector", "merged model"), "path": TEXT, "repo": TEXT,
        "revision": maybe(TEXT), "private": FLAG, "create_pr": FLAG,
        "exists": says("Whether the repository is there; null where the Hub was not asked.",
                       maybe(FLAG)),
        "files": SIZES, "nbytes": COUNT, "deleted": WORDS, "url": TEXT,
        "card": says("README.md as it is committed.", TEXT),
    }  # fmt: skip
    optional = {"commit": {"type": "string", "pattern": "^[0-9a-f]{40}$"},
                "pull_request": maybe(TEXT)}  # fmt: skip
    about = "An upload to the Hub; `tensors` lists files. A dry run has no `commit`."
    return report("push", about, ("uploaded",), required, optional, {"nbytes": COUNT},
                  **together("commit", "pull_request"))  # fmt: skip


def pulled() -> Schema:
    required = {
        "kind": one_of("vector", "merged model"), "repo": TEXT, "revision": maybe(TEXT),
        "files": SIZES, "nbytes": COUNT, "output": TEXT,
    }  # fmt: skip
    about = "A download from the Hub; `tensors` lists files."
    return report("pull", about, ("downloaded",), required, {"nbytes_free": FREE},
                  {"nbytes": COUNT})  # fmt: skip


# -------------------------------------------------------------------------- orthogonality and norms


def numbers(table: AnySequence[Statistic]) -> Schema:
    """Return the numbers of a row, each with what it means."""
    forms = {"word": maybe(TEXT), "list": maybe(several(maybe(NUMBER)))}
    return {
        number.key: says(f"{number.title}: {number.meaning}",
                         forms.get(number.form, maybe(NUMBER)))
        for number in table
    }  # fmt: skip


def row(of: str, *names: str) -> Schema:
    """Return a row of numbers, and what names it."""
    known: Schema = {"properties": dict.fromkeys(names, TEXT), "required": [*names]}
    return named(of) | known | {"unevaluatedProperties": False}


def levels(of: str) -> Schema:
    """Return the keys of rows at every level."""
    groups = ("parts", "modules", "kinds", "layers")
    return {
        "overall": row(of),
        **{key: several(row(of, "name")) for key in groups},
        "tensors": several(row(of, "name", "layer", "kind", "module")),
    }


def measured(verb: str, about: str) -> Schema:
    facts = of_type(angle_report.AngleFacts)["properties"]
    output = facts.pop("output")
    entry = closed({"label": TEXT, "lineage": TEXT, **levels("numbers_of_vector")})
    layer = closed({"name": TEXT, **{key: maybe(NUMBER) for key in
                    ("share", "cosine", "z", "p", "conflict")}})  # fmt: skip
    forecast = closed({
        **numbers([number for number in FORECAST if number.key != "share"]),
        "layers": several(layer), "sentence": TEXT,
    })  # fmt: skip
    pair = closed({
        "a": TEXT, "b": TEXT, "lineage_a": TEXT, "lineage_b": TEXT, "control": maybe(TEXT),
        "shared_rounding": maybe(of_type(angle_report.SharedRounding)), "sentence": TEXT,
        "forecast": forecast, **levels("numbers_of_pair"),
    })  # fmt: skip
    optional = {
        "output": output, **FETCHED, "nbytes_free": FREE, "nonfinite": NONFINITE,
        "norms": several(entry), "pairs": several(pair),
    }  # fmt: skip
    statuses = ("compared", "excluded", "tied", "left out")
    return report(verb, about, statuses, facts | PLANNED, optional, {"nonfinite": NONFINITE},
                  **together("norms", "pairs"))  # fmt: skip


# ------------------------------------------------------------------------------------------- trials

SCORES = by_name(closed({"mean": NUMBER, "standard_error": maybe(SIZE), "items": COUNT}))
DIFFERENCE = {
    "difference": NUMBER, "difference_error": maybe(SIZE), "low": maybe(NUMBER),
    "high": maybe(NUMBER), "p": maybe(SHARE), "is_paired": FLAG,
}  # fmt: skip


def swept() -> Schema:
    point = closed({
        "curve": TEXT, "lam": NUMBER, "status": TEXT, "message": TEXT, "scores": SCORES,
        **{key: maybe(NUMBER) for key in sweep_report.MEASURED},
    }, DIFFERENCE)  # fmt: skip
    required = {
        "formula": TEXT, "target": MODEL, "target_nbytes": COUNT,
        "vector": named("source"), "scale": NUMBER, "name": TEXT, "lineage": TEXT,
        "verdict": one_of(*VERDICTS), "eval": TEXT, "takes_folder": FLAG, "control": WORDS,
        "planned": COUNT, "dtype": TEXT, "device": maybe(TEXT), "rounding": TEXT, "seed": COUNT,
        **TAKEN, **RENAMED, "output": TEXT, "scratch": maybe(TEXT), "lam": several(NUMBER),
        "workers": maybe(COUNT),
    }  # fmt: skip
    beside = closed({"control": TEXT, "score": NUMBER, **DIFFERENCE, "beaten": FLAG})
    ended = {
        "metric": TEXT, "less_is_better": FLAG, "points": several(point), "target_score": NUMBER,
        "best": maybe(point), "found": FLAG, "compared": COUNT, "beside": several(beside),
        "is_known": FLAG, "failed": says("Points whose evaluation failed: exit code 1.", WORDS),
        "load_seconds": maybe(SIZE),
    }  # fmt: skip
    about = "A curve over lambda. A dry run has no `points`."
    return report("sweep", about, (), required, {"resumed": COUNT, **ended},
                  **together("points", *(key for key in ended if key != "points")))  # fmt: skip


def searched() -> Schema:
    space = closed({"op": one_of(*OPERATORS), "dimensions": by_name(TEXT), "start": FREE_FORM})
    required = {
        "eval": TEXT, "report_eval": maybe(TEXT), "space": space, "metric": maybe(TEXT),
        "second": maybe(TEXT), "minimize": WORDS, "keep": SHARE, "sampler": TEXT, "dtype": TEXT,
        "rounding": TEXT, "seed": COUNT, **TAKEN, **RENAMED, "target": TEXT, "vectors": WORDS,
        "budget": COUNT, "output": TEXT, "study": TEXT, "workers": maybe(COUNT),
    }  # fmt: skip
    points = (choosing.TARGET, choosing.PLAIN, choosing.WINNER, choosing.RANDOM)
    compared = closed({
        "one": one_of(*points), "other": one_of(*points, choosing.KEPT), "metric": TEXT,
        "word": one_of("better", "worse", "within noise", choosing.UNKNOWN),
        "difference": NUMBER, "low": maybe(NUMBER), "high": maybe(NUMBER), "p": maybe(SHARE),
        "is_paired": FLAG,
    })  # fmt: skip
    chosen = closed({"trial": COUNT, "point": {"type": "object"}, "recipe": FREE_FORM})
    trial = closed({"by": TEXT, "number": COUNT, "score": NUMBER, "best": NUMBER},
                   {"second": NUMBER, "front": FLAG})  # fmt: skip
    ended = {
        "verdict": one_of(choosing.FOUND, choosing.NOTHING, choosing.UNKNOWN),
        "less_is_better": FLAG, "trials": closed({"complete": COUNT, "failed": COUNT}),
        "reported": by_name(SCORES, points), "searched": by_name(by_name(NUMBER), points),
        "comparisons": several(compared), "chosen": by_name(chosen, points),
        "nbytes": by_name(COUNT, points), "history": several(trial),
        "answer": says("Sentences for people.", WORDS),
    }  # fmt: skip
    kept = {"kept": closed({"share": NUMBER, "low": NUMBER, "high": NUMBER})}
    about = "What a search took, and whether it is more than lambda = 1. A dry run has no `trials`."
    return report("search", about, (), required, ended | kept,
                  **together("trials", *(key for key in ended if key != "trials")))  # fmt: skip


# ------------------------------------------------------------------------------------------- errors


def failed() -> Schema:
    """Return the schema of what stands in place of a report where a verb fails."""
    kinds = [name for name, kind in vars(errors).items()
             if isinstance(kind, type) and issubclass(kind, errors.SkillvecError)]  # fmt: skip
    error = closed({
        "type": says("Where the reason lies; new types may come, exit codes do not change.",
                     one_of(*kinds, "OSError", "Interrupted")),
        "exit_code": {"enum": [1, 2, 3]},
        "message": says("Text for people, as on stderr.", TEXT),
    })  # fmt: skip
    known = {"verb": maybe(TEXT), "format_version": {"const": FORMAT_VERSION}, "error": error}
    return headed("error", "What stands in place of a report where a verb fails.", closed(known))


SHARED = {
    "model": CHECKPOINT, "source": SOURCE,
    "numbers_of_vector": {"type": "object", "properties": numbers(VECTORS)},
    "numbers_of_pair": {"type": "object", "properties": numbers(PAIRS)},
}  # fmt: skip


def schemas() -> dict[str, Schema]:
    """Return the schema of each verb by its name, and that of errors."""
    return {
        "diff": stored("diff", "A vector: TUNED - BASE."),
        "combine": stored("combine", "A vector made of others."),
        "import-patch": stored("import-patch", "A vector made of a patch."),
        "apply": applied(), "export-patch": exported(), "extract-lora": extracted(),
        "verify": verified(), "inspect": inspected(), "push": pushed(), "pull": pulled(),
        "orthogonality": measured("orthogonality", "How vectors are related."),
        "norms": measured("norms", "How large a vector is, and where."),
        "sweep": swept(), "search": searched(), "error": failed(),
    }  # fmt: skip


def write(folder: Path) -> None:
    for name, schema in schemas().items():
        text = json.dumps(schema, indent=1, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
