"""Let a model write what follows from each passage; prepare.py makes texts of it.

    python -m skillvec.recipes.squad.implications --model Qwen/Qwen2.5-7B \\
        --data runs/squad/items/target_items.jsonl -o runs/squad/completions.jsonl

Hides resuming. Rows (id, index, title, model, completion) are appended to OUTPUT.partial as they
come; OUTPUT exists only when every passage has all of its completions. A second run continues: it
asks for what is missing, and starts no engine if nothing is. Every (passage, index, try) has its
own seed. Refuses to go on with rows of another model or other sampling, and completions that are
the same each time. An empty completion is asked again `--retries` times, then CompletionError names
the passages; what was written is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from skillvec.recipes.squad.items import Passage, first_five, read_jsonl, read_passages
from skillvec.recipes.squad.texts import writing_prompt
from skillvec.recipes.squad.writers import (
    CompletionError,
    Sampling,
    Writer,
    endpoint_writer,
    transformers_writer,
    vllm_writer,
)

Slot = tuple[Passage, int]
Ask = Callable[[Passage], str]  # what a model is shown about a passage


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.squad.implications", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="ITEMS",
                        help="NAME_items.jsonl of prepare")  # fmt: skip
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of everything that lets a model write about passages."""
    add = parser.add_argument
    add("--model", required=True, help="folder, Hub id, or the name that the endpoint serves")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help=".jsonl")
    add("--completions", type=int, default=5, help="of each passage (%(default)s)")
    add("--engine", choices=("transformers", "vllm"), default="transformers")
    add("--url", help="OpenAI-compatible endpoint to ask, instead of an engine here")
    add("--temperature", type=float, default=1.0, help="%(default)s")
    add("--top-p", type=float, default=0.95, help="%(default)s")
    add("--max-new-tokens", type=int, default=2048, help="%(default)s")
    add("--batch", type=int, default=8, help="completions at a time (%(default)s)")
    add("--retries", type=int, default=3, help="askings after an empty completion (%(default)s)")
    add("--timeout", type=float, default=600.0, help="seconds of one try of --url (%(default)s)")
    add("--seed", type=int, default=0)
    add("--chat", action="store_true", help="through the chat template, for instruct models")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; return 2 where an input is refused, 1 where the model fails."""
    options = build_parser().parse_args(arguments)
    try:
        passages = [passage for source in options.data for passage in read_passages(source)]
        write_completions(options, passages, writing_prompt)
    except (ValueError, CompletionError) as error:
        print(f"implications: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def write_completions(options: argparse.Namespace, found: Iterable[Passage], ask: Ask) -> None:
    """Ask for every completion that is missing, and give the file its name at the end."""
    for name in ("completions", "batch", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected 1 or more")
    sampling = Sampling(options.temperature, options.top_p, options.max_new_tokens, options.chat)
    drawn = {"model": options.model, "sampling": vars(sampling)}
    passages = {passage.id: passage for passage in found}
    output: Path = options.output
    partial = output.with_name(output.name + ".partial")
    kept = partial if partial.is_file() else output  # complete, or so for fewer completions
    done = read_done(kept, drawn)
    slots = [(p, index) for p in passages.values() for index in range(options.completions)]
    waiting = [slot for slot in slots if (slot[0].id, slot[1]) not in done]
    if waiting:
        write = start_writer(options, sampling)
        output.parent.mkdir(parents=True, exist_ok=True)
        if kept == output and output.is_file():
            output.rename(partial)
        fill(partial, waiting, lambda batch, seeds: write([ask(p) for p in batch], seeds), options,
             drawn)  # fmt: skip
    if partial.is_file():
        partial.replace(output)
    print(f"{output}: {len(slots)} completions of {len(passages)} passages")


def start_writer(options: argparse.Namespace, sampling: Sampling) -> Writer:
    """Return the engine that the options name."""
    if options.url:
        return endpoint_writer(options.url, options.model, sampling, options.timeout)
    start = vllm_writer if options.engine == "vllm" else transformers_writer
    return start(options.model, sampling)


def fill(
    partial: Path,
    waiting: Sequence[Slot],
    write: Callable[[Sequence[Passage], Sequence[int]], list[str]],
    options: argparse.Namespace,
    drawn: dict[str, Any],
) -> None:
    """Append a row for every slot, batch by batch; raise CompletionError for empty ones.

    Raises it too, and early, where every passage gets the same text each time.
    """
    failed: list[str] = []
    said: dict[str, list[str]] = {}
    with partial.open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), options.batch):
            batch = list(waiting[start : start + options.batch])
            for attempt in range(1 + options.retries):
                seeds = [_seed(options.seed, *slot, attempt) for slot in batch]
                asked = [passage for passage, _ in batch]
                written = [text.strip() for text in write(asked, seeds)]
                for (passage, index), text in zip(batch, written, strict=True):
                    row = {"id": passage.id, "index": index, "title": passage.title} | drawn
                    if text:
                        line = json.dumps(row | {"completion": text}, ensure_ascii=False)
                        file.write(line + "\n")
                        said.setdefault(passage.id, []).append(text)
                file.flush()
                batch = [slot for slot, text in zip(batch, written, strict=True) if not text]
                if not batch:
                    break
            failed += [f"{passage.title} ({passage.id})" for passage, _ in batch]
            several = [texts for texts in said.values() if len(texts) > 1]
            if options.temperature and len(several) > 2 and all(len(set(t)) == 1 for t in several):
                raise CompletionError(
                    f"{options.model}: the completions of {len(several)} passages are the same "
                    "each time, so nothing is sampled; a server may need do_sample: true in the "
                    f"model's generation_config.json. Then delete {partial} and start again"
                )
    if failed:
        raise CompletionError(
            f"{options.model}: {1 + options.retries} empty completions each for "
            f"{first_five(failed, 'slot')}; raise --retries, or use a model that goes on with text"
        )


def read_done(kept: Path, drawn: dict[str, Any]) -> set[tuple[str, int]]:
    """Return the (id, index) that are there; a last line cut off in mid-writing is taken away."""
    if not kept.is_file():
        return set()
    data = kept.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        kept.write_bytes(whole)
    rows = read_jsonl(kept)
    other = [n for n, row in enumerate(rows) if {key: row.get(key) for key in drawn} != drawn]
    if other:
        raise ValueError(
            f"{kept}: written by another model or other sampling, {first_five(other, 'row')} "
            f"(expected {drawn}, found {rows[other[0]].get('model')}); move the file away"
        )
    return {(row["id"], row["index"]) for row in rows}


def _seed(seed: int, passage: Passage, index: int, attempt: int) -> int:
    text = f"{seed} {passage.id} {index} {attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


if __name__ == "__main__":
    sys.exit(main())
