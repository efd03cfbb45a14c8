"""A target as a model of transformers in memory, with its tokenizer.

Hides which class loads it. What can be said without its weights is said before they are read.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skillvec.checkpoints.checkpoint import Checkpoint
from skillvec.checkpoints.opening import open_checkpoint
from skillvec.errors import IncompatibleError, UsageError, needs, up_to_five
from skillvec.files.file import remote_of
from skillvec.remote.references import is_of_store, is_url

GGUF = ".gguf"


def open_target(ref: str) -> Checkpoint:
    """Open a target that transformers can load: a folder with config.json, a GGUF file, the Hub's.

    Raises UsageError for anything else, and what `open_checkpoint` raises.
    """
    if is_of_store(ref):
        raise UsageError(f"target {ref}: a model is loaded from a folder: download it first")
    point = open_checkpoint(ref, "target")
    is_gguf = point.path.suffix == GGUF
    if not point.is_folder and not is_gguf:
        raise UsageError(f"target {ref}: transformers loads folders: name the one that it lies in")
    if not is_gguf and not (point.folder / "config.json").is_file():
        raise UsageError(
            f"target {ref}: no config.json in {point.folder}, so that transformers cannot load it"
        )
    return point


def fetch(point: Checkpoint) -> None:
    """Download the weights of a target of the Hub into the cache."""
    elsewhere = [file for file in point.files if is_url(file) and remote_of(file) is not None]
    if elsewhere:
        from skillvec.remote.hub import fetch_all

        fetch_all(elsewhere)


def load_target(point: Checkpoint, dtype: str = "auto", device: str = "cpu") -> Any:
    """Return the model in eval mode.

    Raises UsageError for one that transformers does not load, IncompatibleError for one of which
    the checkpoint does not hold every parameter.
    """
    with needs("hf", f"target {point.ref}"):
        import transformers

    fetch(point)
    named = point.config.get("architectures") or [None]
    kind: Any = getattr(transformers, str(named[0]), None) or transformers.AutoModelForCausalLM
    with _without_bars():
        try:
            options = _place(point) | {"dtype": dtype} | _dequantised(point)
            model = load_whole(kind, point.ref, **options)
        except IncompatibleError:  # a ValueError, as transformers' own are
            raise
        except (ValueError, OSError, KeyError, ImportError) as error:
            raise UsageError(
                f"target {point.ref}: transformers does not load it: {error}"
            ) from None
    return model.to(device).eval()


def load_whole(kind: Any, ref: str, *place: str, **options: Any) -> Any:
    """Return what from_pretrained of a class of transformers makes of `place` and `options`.

    Raises IncompatibleError for parameters that the checkpoint `ref` lacks: transformers draws them
    at random, warns of it, and goes on.
    """
    model, told = kind.from_pretrained(*place, output_loading_info=True, **options)
    if missing := sorted(told["missing_keys"]):
        raise IncompatibleError(
            f"{ref}: the checkpoint lacks parameters of its model, which transformers would draw at"
            f" random:\n{up_to_five(missing)}"
        )
    return model


def open_tokenizer(point: Checkpoint) -> Any:
    """Return the tokenizer of a target; UsageError where it has none that transformers reads."""
    with needs("hf", f"target {point.ref}"):
        import transformers
    try:
        if point.path.suffix == GGUF:
            with _without_bars():
                return transformers.AutoTokenizer.from_pretrained(**_place(point))
        return load_tokenizer(str(point.folder))
    except Exception as error:  # transformers raises many kinds
        said = " ".join(str(error).split())
        raise UsageError(
            f"target {point.ref}: no tokenizer that transformers reads: {said:.300}"
        ) from None


def load_tokenizer(name: str) -> Any:
    """Return a tokenizer as it was saved.

    AutoTokenizer goes by the model's type: over a word-level tokenizer beside a Qwen2 it would put
    Qwen's splitting into bytes. So a folder that names the plain class gets the plain class.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = Path(name, "tokenizer_config.json")
    saved = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    plain = saved.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(name)


def _place(point: Checkpoint) -> dict[str, str]:
    """Return the arguments of from_pretrained that say where a target is."""
    given = {"pretrained_model_name_or_path": str(point.folder)}
    return given | {"gguf_file": point.path.name} if point.path.suffix == GGUF else given


def _dequantised(point: Checkpoint) -> dict[str, Any]:
    """Return what makes transformers unpack all of a GGUF file, and take it for a plain model."""
    if point.path.suffix != GGUF:
        return {}
    from transformers import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' bars of progress from the screen."""
    from transformers import utils

    logging: Any = utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
