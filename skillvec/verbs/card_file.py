"""A README.md of the Hub: its metadata, and the part between marks that skillvec writes."""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from skillvec.errors import UsageError

BEGIN, END = "<!-- skillvec:begin", "<!-- skillvec:end -->"
OPENED = re.compile(BEGIN + "((?: [a-z_]+=[0-9a-f]{12})*) -->")
KEYS = (  # in the library's order
    "base_model", "language", "library_name", "license", "license_name", "license_link",
    "pipeline_tag", "tags", "base_model_relation",
)  # fmt: skip
# a word that stands in YAML without quotes, unless it is reserved
PLAIN = re.compile(r"[A-Za-z](?:[\w./-]*\w)?", re.ASCII)
RESERVED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
MOST_VALUES = 100_000  # of metadata: real ones have hundreds


def digest_text(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def make_card(data: dict[str, Any], body: str) -> str:
    block = enclose(data, "\n" + body.replace("<!--", "&lt;!--") + "\n")
    return f"---\n{to_yaml(data)}\n---\n\n{block}\n"


def to_yaml(data: Mapping[str, Any]) -> str:
    """Return metadata as the library writes it, which is asked where a word may need quotes.

    Its import takes as long as all that it writes in a merge of small models.
    """
    lists = [value if type(value) is list else [value] for value in data.values()]
    plain = all(type(w) is str and PLAIN.fullmatch(w) for words in lists for w in words)
    plain = plain and not RESERVED & {word.lower() for words in lists for word in words}
    if not (data and plain and {*data} <= {*KEYS} and all(lists)):
        from huggingface_hub import ModelCardData

        return str(ModelCardData(**data).to_yaml())
    lines = []
    for key in sorted(data, key=KEYS.index):
        value = dict.fromkeys(data[key]) if key == "tags" else data[key]
        lines += [f"{key}: {value}"] if type(value) is str else [f"{key}:"]
        lines += [] if type(value) is str else [f"- {word}" for word in value]
    return "\n".join(lines)


def enclose(data: Mapping[str, Any], block: str) -> str:
    return BEGIN + "".join(f" {key}={digest_text(data[key])}" for key in data) + f" -->{block}{END}"


def parse_card(text: str) -> Any:
    from huggingface_hub import RepoCard  # ModelCard would interpret values of a user

    if not text.lstrip().startswith("---"):
        text = "---\n\n---\n" + text  # else the library warns of it
    try:
        card: Any = RepoCard(text)
        values = [card.data.to_dict()]
        for value in values:  # an alias of YAML counts as all that it stands for
            if isinstance(value, dict | list):
                values += value.values() if isinstance(value, dict) else value
            if len(values) > MOST_VALUES:
                raise ValueError(f"more than {MOST_VALUES} values")
        return card
    except Exception as error:  # of the YAML parser, which only recipe.py imports, or of the class
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"README.md: its metadata (between the lines of ---) cannot be read: {reason}: mend it"
        ) from None


def split_card(text: str) -> tuple[str, str, str | None, dict[str, str]]:
    """Return what stands before, in and behind the generated part, and its digests by key."""
    begins, ends = list(OPENED.finditer(text)), [m.start() for m in re.finditer(END, text)]
    if not text.count(BEGIN) and not ends:
        return text, "", None, {}
    if [len(begins), len(ends), text.count(BEGIN)] != [1, 1, 1] or ends[0] < begins[0].end():
        raise UsageError(
            f"README.md: expected one line `{BEGIN} ... -->` and one `{END}` behind it, which"
            " enclose what is generated: restore them, or remove both"
        )
    begin, end = begins[0], ends[0]
    marks = dict(mark.split("=") for mark in begin[1].split())
    return text[: begin.start()], text[begin.end() : end], text[end + len(END) :], marks


def set_keys(head: str, card: Any, ours: dict[str, Any], old: set[str], ending: str) -> str:
    """Return the metadata with keys set and old ones of ours removed; other lines stay."""
    from huggingface_hub import CardData

    added = to_yaml(ours).splitlines() if ours else []
    expected = {k: v for k, v in card.data.to_dict().items() if k not in old} | ours
    inside, kept, dropped = head.strip().splitlines()[1:-1], [], False
    for line in inside:
        if found := re.match(r"""(['"]?)([\w-]+)\1\s*:""", line):
            dropped = found[2] in ours or found[2] in old
        if not dropped or line.startswith("#"):
            kept.append(line)
    made = ending.join(["---", *kept, *added, "---", ""])
    try:
        if parse_card(made).data.to_dict() == expected:
            return made
    except UsageError:
        pass  # such as {license: mit} on one line: written anew, in the library's form
    return ending.join(["---", *CardData(**expected).to_yaml().splitlines(), "---", ""])
