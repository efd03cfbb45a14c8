"""ToolBench's API documents and queries, as they stand in its instruction files.

Hides ToolBench's schema and its rules for names: a function is `<api>_for_<tool>`, lower case, with
underscores, and so are its parameters. Invariants: within one list no two functions share a name,
and a category is given only to a query whose APIs all belong to it. Refuses files that are not a
list of items and items without APIs or query, by file and number.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

# ToolBench's types; what is not here (ENUM, DATE, OBJECT, ...) is written as text
TYPES = {"NUMBER": "number", "INTEGER": "integer", "BOOLEAN": "boolean"}
RESERVED = {"id", "false", "true", "self"}  # beside Python's own words
PLACEHOLDERS: dict[str, Any] = {"number": 1, "integer": 1, "boolean": True, "string": "text"}


@dataclass(frozen=True)
class Parameter:
    """One argument of a function; `kind` is its type in JSON Schema."""

    name: str
    kind: str
    description: str
    required: bool
    default: Any

    def example(self) -> Any:
        """Return the document's default in the declared type, or a placeholder."""
        text = "" if self.default is None else str(self.default).strip()
        if self.kind == "string":
            return text or PLACEHOLDERS["string"]
        try:
            value = json.loads(text.lower())
        except ValueError:
            return PLACEHOLDERS[self.kind]
        fits = isinstance(value, bool) == (self.kind == "boolean") and not isinstance(value, list)
        return value if fits and value is not None else PLACEHOLDERS[self.kind]


@dataclass(frozen=True)
class Api:
    """One function: what the model calls, and the names that the server knows it by."""

    name: str
    category: str
    tool: str
    api: str
    description: str
    method: str
    parameters: tuple[Parameter, ...]
    response: Any

    def definition(self) -> dict[str, Any]:
        """Return name, description and parameters in JSON Schema, as a model's tools are told."""
        properties = {p.name: {"type": p.kind, "description": p.description}
                      for p in self.parameters}  # fmt: skip
        required = [p.name for p in self.parameters if p.required]
        return {
            "name": self.name,
            "description": self.description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        }


@dataclass(frozen=True)
class Item:
    """One query with the APIs that may serve it; `relevant` are (tool, api) that ToolBench names.

    `category` is None where the APIs come from several.
    """

    query: str
    documents: tuple[Mapping[str, Any], ...]
    relevant: tuple[tuple[str, str], ...]
    category: str | None

    @property
    def environment(self) -> str:
        """Return a name for the list of APIs, the same for the same list."""
        text = json.dumps(self.documents, sort_keys=True, default=str)
        return sha256(text.encode()).hexdigest()[:16]

    @property
    def tools(self) -> set[str]:
        """Return the tools, by category and name."""
        return {f"{d['category_name']}/{d['tool_name']}" for d in self.documents}


def function_name(api: str, tool: str) -> str:
    """Return `<api>_for_<tool>`."""
    return f"{standard_name(api)}_for_{standard_name(tool)}"


def standard_name(text: str) -> str:
    """Return a lower-case identifier: ToolBench's rule, kept to ASCII; `id` becomes `is_id`."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"
    name = f"get_{name}" if name[0].isdigit() else name
    return f"is_{name}" if name in RESERVED or keyword.iskeyword(name) else name


def read_api(document: Mapping[str, Any]) -> Api:
    """Read one entry of an `api_list`; KeyError where a name is missing."""
    listed = [(p, True) for p in document.get("required_parameters") or []]
    listed += [(p, False) for p in document.get("optional_parameters") or []]
    parameters: dict[str, Parameter] = {}
    for entry, required in listed:
        name = standard_name(entry["name"])
        kind = TYPES.get(str(entry.get("type", "")).upper(), "string")
        about = " ".join(str(entry.get("description") or "").split())
        parameters.setdefault(name, Parameter(name, kind, about, required, entry.get("default")))
    return Api(
        name=function_name(document["api_name"], document["tool_name"]),
        category=document["category_name"],
        tool=document["tool_name"],
        api=document["api_name"],
        description=" ".join(str(document.get("api_description") or "").split()),
        method=str(document.get("method") or "GET"),
        parameters=tuple(parameters.values()),
        response=document.get("template_response"),
    )


def read_apis(documents: Iterable[Mapping[str, Any]]) -> dict[str, Api]:
    """Return the functions by name; of two documents with one name the first counts."""
    apis: dict[str, Api] = {}
    for document in documents:
        api = read_api(document)
        apis.setdefault(api.name, api)
    return apis


def read_items(paths: Sequence[str | Path]) -> list[Item]:
    """Read instruction files (G1_query.json and the like); ValueError says file and item."""
    items = []
    for path in map(Path, paths):
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: expected ToolBench's JSON of queries: {error}") from None
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{path}: expected a list of items with api_list and query")
        for number, item in enumerate(listed):
            try:
                items.append(_read_item(item))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{path}: item {number}: expected {error}") from None
    return items


def _read_item(item: Mapping[str, Any]) -> Item:
    query = item["query"]
    query = query[0] if isinstance(query, list) and query else query
    if not isinstance(query, str) or not query.strip():
        raise ValueError("a query in words; leave the item out or fill it")
    documents = tuple(item["api_list"])
    if not documents:
        raise ValueError("one or more APIs in api_list; leave the item out or fill it")
    read_apis(documents)
    categories = {document["category_name"] for document in documents}
    relevant = tuple((tool, api) for tool, api in item.get("relevant APIs") or [])
    category = categories.pop() if len(categories) == 1 else None
    return Item(query.strip(), documents, relevant, category)
