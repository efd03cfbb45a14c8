"""Second moments of the inputs of a model's layers on calibration prompts, for `--activations`.

    python -m skillvec.recipes.calibrate --model M --data prompts.jsonl -o moments.safetensors
    skillvec orthogonality A B --activations moments.safetensors

Runs the prompts once through the model, with a hook before every layer that multiplies its input by
a matrix: torch's Linear and transformers' Conv1D. Of each input x (n values a token) the file holds
E[x x'] and E[x] in fp32, summed in fp64; layers that share an input, as q, k and v do, share them.
docs/format.md describes the file. Rows of the .jsonl file hold `prompt` (text, or messages for the
chat template, which a generation prompt ends), or `messages`, or `text`. Padding is in no sum.

Weights go by the names that they have in the checkpoint. Left out, and named: embeddings, which
are looked up; layers that get part of the tokens, as routed experts do; parameters that hold
several matrices, as fused experts do; weights that transformers puts together from several
tensors of the checkpoint. The same model, prompts and machine give the same bytes. What would be
written, and what memory it takes, is checked before the model has seen the first batch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from skillvec.errors import SkillvecError
from skillvec.ops.svd import resolve_device
from skillvec.recipes.evaluate import load_tokenizer
from skillvec.trials.loading import load_whole

SCHEMA = 1
KEYS = ("prompt", "messages", "text")
TRACED = 16  # tokens a prompt, that show which layers share an input
AT_ONCE = 4096  # tokens of an input that are turned to fp64 at a time


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="skillvec.recipes.calibrate", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True, help="prompts, .jsonl")
    parser.add_argument("-o", "--output", type=Path, required=True, help="moments, .safetensors")
    parser.add_argument("--include", action="append", default=[], metavar="GLOB",
                        help="only these weights")  # fmt: skip
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB",
                        help="not these weights")  # fmt: skip
    parser.add_argument("--limit", type=int, help="only the first so many prompts")
    parser.add_argument("--max-length", type=int, default=512, metavar="TOKENS",
                        help="of a prompt; what is longer is cut (%(default)s)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto: as stored; or float32, bfloat16")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    try:
        about = calibrate(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError, SkillvecError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 2
    for name, why in about["left_out"].items():
        print(f"left out: {name}: {why}")
    return 0


def calibrate(
    model: str | Path,
    data: Path,
    output: Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int | None = None,
    max_length: int = 512,
    batch: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the moments of a model's inputs; return what the file says of itself.

    Raises ValueError for data, names and places that cannot be used, SkillvecError for checkpoints
    that cannot be read.
    """
    check_place(output, force)
    if min(max_length, batch) < 1 or (limit is not None and limit < 1):
        raise ValueError("max_length, batch and limit are at least 1")
    prompts = read_prompts(data, limit)
    loaded, folder = load_model(str(model), dtype, device)
    tokenizer = load_tokenizer(folder)
    encoded = [encode(tokenizer, prompt)[:max_length] for prompt in prompts]
    pad = tokenizer.pad_token_id or 0
    batches = [encoded[at : at + batch] for at in range(0, len(encoded), batch)]

    layers, left_out = find_layers(loaded, folder, include, exclude)
    taken = Inputs(layers)
    left_out |= taken.trace(loaded, [one[:TRACED] for one in batches[0]], pad)
    if not taken.sums:
        raise ValueError("no layer is left to look at")
    check_room(taken, output)
    run(loaded, taken, batches, pad)
    about = {
        "kind": "moments", "schema": SCHEMA, "model": str(model), "data": data.name,
        "prompts": len(prompts), "tokens": sum(map(len, encoded)), "max_length": max_length,
        "dtype": str(loaded.dtype).removeprefix("torch."), "left_out": left_out,
        "weights": taken.weights(),
    }  # fmt: skip
    write(taken, about, output)
    print(f"written: {output}, {about['tokens']:,} tokens of {len(prompts)} prompts", flush=True)
    return about


def check_place(output: Path, force: bool) -> None:
    """Raise ValueError for an output that is there already, or can be none."""
    if output.exists() and not force:
        raise ValueError(f"{output} exists; --force overwrites it")
    if output.suffix != ".safetensors" or not output.parent.is_dir():
        raise ValueError(f"{output}: expected a .safetensors file in a folder that is there")


def read_prompts(path: Path, limit: int | None = None) -> list[tuple[str, Any]]:
    """Return kind and content of every row; ValueError names the lines that hold none."""
    if path.suffix != ".jsonl" or not path.is_file():
        raise ValueError(f"{path}: expected an existing .jsonl file of prompts")
    found, wrong = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        key = next((key for key in KEYS if isinstance(row, dict) and row.get(key)), None)
        if key is None or not isinstance(row[key], str | list):
            wrong.append(number)
        else:
            found.append((key, row[key]))
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(f"{path}: {len(wrong)} rows have none of {KEYS}; lines {shown}")
    if not found:
        raise ValueError(f"{path}: no prompts")
    return found[:limit]


def encode(tokenizer: Any, prompt: tuple[str, Any]) -> list[int]:
    """Return the tokens of a prompt; those of messages as the chat template has them."""
    key, content = prompt
    if isinstance(content, str):
        ids = tokenizer(content)["input_ids"]
    elif not tokenizer.chat_template:
        raise ValueError("prompts are messages, but the model's tokenizer has no chat template")
    else:
        text = tokenizer.apply_chat_template(
            content, add_generation_prompt=key == "prompt", tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"no token in {content!r:.80}")
    return list(ids)


def load_model(name: str, dtype: str, device: str | None) -> tuple[Any, str]:
    """Return a model of the class that its config names, in eval mode, and its folder."""
    import transformers

    from skillvec.recipes.training import fetch_model

    place, folder = resolve_device(device or "auto"), fetch_model(name)
    config = transformers.AutoConfig.from_pretrained(folder)
    if config.is_encoder_decoder:
        raise ValueError(f"{name}: a decoder that gets no inputs of its own has none to look at")
    made = getattr(transformers, (config.architectures or [""])[0], None)
    model = load_whole(made or transformers.AutoModelForCausalLM, name, folder, dtype=dtype)
    return model.to(place).eval(), folder


# ---------------------------------------------------------------------------------- layers


class Layer(NamedTuple):
    """A layer, its weight's name in the checkpoint, and which side of it meets the input."""

    weight: str
    module: Any
    width: int
    side: str  # "columns" of an m x n weight, "rows" of an n x m one

    @property
    def entry(self) -> str:
        return self.weight.removesuffix(".weight")


def find_layers(
    model: Any, folder: str, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers whose weight is a matrix of the checkpoint, and why others are left out."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from skillvec.vectors.recipe import is_selected

    layers, left_out, known = [], {}, names_in_files(model, folder)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, torch.nn.Linear | Conv1D) or weight is None:
            continue
        stored = known.get(f"{name}.weight")
        if stored is None:
            left_out[f"{name}.weight"] = "no tensor of the checkpoint alone"
        elif is_selected(stored, include, exclude):
            turned = isinstance(module, Conv1D)
            width, side = weight.shape[0 if turned else 1], "rows" if turned else "columns"
            layers.append(Layer(stored, module, width, side))
    return layers, left_out


def names_in_files(model: Any, folder: str) -> dict[str, str]:
    """Return the names in the checkpoint of the weights that are one tensor of it, by their own.

    A tied weight has the name of the one that is stored.
    """
    from skillvec.checkpoints.held_model import Held
    from skillvec.checkpoints.opening import open_checkpoint
    from skillvec.checkpoints.transformers_layouts import all_of

    held = Held(open_checkpoint(folder))
    shapes = {name: tuple(spec.shape) for name, spec in held.base.items()}
    whole = {}
    for name, view in held.views(shapes).items():
        if len(view.sources) == 1 and view == all_of(view.sources[0], shapes[view.sources[0]]):
            whole[name] = view.sources[0]
    by_id: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(weight), []).append(name)
    return {
        name: whole[stored]
        for names in by_id.values()
        for name in names
        for stored in [next((n for n in (name, *names) if n in whole), None)]
        if stored is not None
    }


class Sums:
    """Sums over the tokens of an input, in fp64 on the device of the model, made when wanted."""

    def __init__(self, width: int) -> None:
        self.width, self.tokens = width, 0
        self.second, self.first = None, None

    def add(self, tokens: Any) -> None:
        for at in range(0, len(tokens), AT_ONCE):
            piece = tokens[at : at + AT_ONCE].double()
            if self.second is None:
                self.second = piece.new_zeros((self.width, self.width))
                self.first = piece.new_zeros(self.width)
            self.second.addmm_(piece.T, piece)
            self.first += piece.sum(0)
        self.tokens += len(tokens)


class Inputs:
    """The inputs of layers: which are one, and the sums of each."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers, self.mask = list(layers), None
        self.sums: dict[str, Sums] = {}  # by entry, which is the first layer's of an input
        self.owner: dict[str, str] = {}  # weight -> entry
        self.seen: dict[str, Any] = {}

    def trace(self, model: Any, batch: Sequence[Sequence[int]], pad: int) -> dict[str, str]:
        """Run a batch to learn which layers share an input; return those that cannot be taken.

        Layers share one if they are given the same object whenever they are called.
        """
        calls: dict[str, list[Any]] = {layer.weight: [] for layer in self.layers}
        with hooked(self.layers, lambda layer, x: calls[layer.weight].append(x)):
            rows = len(forward(model, batch, pad).reshape(-1))
        left_out, first = {}, {}
        for layer in self.layers:
            inputs = calls[layer.weight]
            if not inputs:
                left_out[layer.weight] = "not called"
            elif any(x.numel() != rows * layer.width for x in inputs):
                left_out[layer.weight] = "its input is not one vector a token"
            else:
                self.owner[layer.weight] = first.setdefault(tuple(map(id, inputs)), layer.entry)
                if self.owner[layer.weight] == layer.entry:
                    self.sums[layer.entry] = Sums(layer.width)
        self.layers = [layer for layer in self.layers if layer.weight in self.owner]
        return left_out

    def add(self, layer: Layer, x: Any) -> None:
        """Take an input; ValueError where a layer is used in another way than in the trace."""
        entry = self.owner[layer.weight]
        if entry != layer.entry:
            if self.seen.get(entry) is not x:
                raise ValueError(f"{layer.weight} no longer shares the input of {entry}")
            return
        self.seen[entry], tokens = x, x.reshape(-1, layer.width)
        if self.mask is None or len(tokens) != len(self.mask):
            raise ValueError(f"{layer.weight}: {len(tokens)} inputs, expected one a token")
        self.sums[entry].add(tokens[self.mask])

    def weights(self) -> dict[str, dict[str, str]]:
        return {layer.weight: {"entry": self.owner[layer.weight], "input": layer.side}
                for layer in self.layers}  # fmt: skip


@contextmanager
def hooked(layers: Sequence[Layer], take: Any) -> Iterator[None]:
    """Call `take` with a layer and its input before it runs."""

    def hook(layer: Layer) -> Any:
        return lambda module, given: take(layer, given[0])

    handles = [layer.module.register_forward_pre_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: Any, batch: Sequence[Sequence[int]], pad: int, before: Any = None) -> Any:
    """Run a batch, padded to the right; return its mask, which `before` is given first."""
    import torch

    width = max(map(len, batch))
    ids = torch.tensor([[*one, *[pad] * (width - len(one))] for one in batch])
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in batch])
    ids, mask = ids.to(model.device), mask.to(model.device)
    if before:
        before(mask)
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=mask)
    return mask


def run(model: Any, taken: Inputs, batches: Sequence[Any], pad: int) -> None:
    """Run all batches with hooks, and say how far that is every ten seconds."""
    began = said = time.monotonic()

    def masked(mask: Any) -> None:
        taken.mask = mask.reshape(-1).bool()

    with hooked(taken.layers, taken.add):
        for done, batch in enumerate(batches, start=1):
            forward(model, batch, pad, masked)
            taken.seen.clear()
            if time.monotonic() - said > 10:
                said = time.monotonic()
                left = (said - began) / done * (len(batches) - done)
                print(f"  {done}/{len(batches)} batches, about {left:.0f} s left", flush=True)


# ----------------------------------------------------------------------------------- file


def check_room(taken: Inputs, output: Path) -> None:
    """Say what is made, and raise ValueError where disk or memory have no room for it."""
    numel = sum(sums.width * (sums.width + 1) for sums in taken.sums.values())
    print(f"{len(taken.layers)} layers, {len(taken.sums)} inputs: ", end="")
    advice = "take fewer layers at a time (--include, --exclude)"
    refuse_full(4 * numel, 8 * numel, taken.layers[0].module.weight.device, output, advice)


def refuse_full(disk: int, memory: int, device: Any, output: Path, advice: str) -> None:
    """Say how many bytes are wanted; raise ValueError where they are not free on disk or device."""
    import torch

    from skillvec.analysis.wording import human_bytes
    from skillvec.files.output_file import available_memory_nbytes

    on_host = device.type != "cuda"
    free = available_memory_nbytes() if on_host else torch.cuda.mem_get_info(device)[0]
    wanted = {"the disk": (disk, shutil.disk_usage(output.parent).free), "memory": (memory, free)}
    print(
        ", ".join(
            f"{human_bytes(size)} of {what} ({human_bytes(room)} free)"
            for what, (size, room) in wanted.items()
        ),
        flush=True,
    )
    for what, (size, room) in wanted.items():
        if size > room:
            raise ValueError(
                f"{human_bytes(size)} of {what} wanted, {human_bytes(room)} free: {advice}"
            )


def write(taken: Inputs, about: dict[str, Any], output: Path) -> None:
    """Write what was summed up, divided by the tokens."""
    tensors = {}
    for entry in list(taken.sums):
        sums = taken.sums.pop(entry)  # halves what is held, one by one
        second, mean = sums.second / sums.tokens, sums.first / sums.tokens
        tensors[f"{entry}.moment"] = ((second + second.T) / 2).float().cpu().contiguous()
        tensors[f"{entry}.mean"] = mean.float().cpu()
    write_tensors(tensors, about, output)


def write_tensors(tensors: dict[str, Any], about: dict[str, Any], output: Path) -> None:
    """Write the file under a temporary name and rename it; ValueError for what is not finite."""
    import torch
    from safetensors.torch import save_file

    from skillvec import __version__

    wrong = [name for name, values in tensors.items() if not torch.isfinite(values).all()]
    if wrong:
        raise ValueError(f"{len(wrong)} sums are not finite, such as {wrong[0]}; try float32")
    said = json.dumps(about | {"tool": f"skillvec {__version__}"}, separators=(",", ":"))
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata={"skillvec": said})  # two come in any order
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
