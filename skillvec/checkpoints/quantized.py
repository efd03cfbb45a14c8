"""Quantised checkpoints: which format a config names, and what becomes of every tensor.

What a tensor is comes from its partners, never from a list of layers. A new format is a file with a
`find` (quantized_format.QuantizedFormat) and a row of `FORMATS`.

Refused by name: other methods (bitsandbytes, gptq, awq, nvfp4, hqq, fbgemm_fp8, modelopt, ...) and
formats, reordered columns, rotated weights, scales without weights, weights without scales, and
what no config explains: 8-bit floats, and integers that are called weights or lie beside tensors
that scale them, whatever their names. Integer buffers (masks, positions, indexes, counts) pass.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from skillvec.checkpoints.quantized_format import PARTNERS, FoundWeight, QuantizedFormat, Stated
from skillvec.checkpoints.unread import (
    FLOATS,
    LeftOut,
    Tensors,
    nothing_left_out,
    refuse_unexplained,
)
from skillvec.errors import FormatError, IncompatibleError, up_to_five
from skillvec.files.tensors import Source
from skillvec.files.views import Index
from skillvec.ops.kernels import DTYPE_NAMES


def _is_mlx(settings: object) -> bool:
    """Return whether settings are those of mlx, which names no method."""
    return isinstance(settings, dict) and {"group_size", "bits"} <= set(settings)


def _later(file: str, name: str) -> Callable[[Tensors, Stated], Iterator[FoundWeight | str]]:
    """Return a function of a file of formats, which is imported for checkpoints that name one."""

    def find(tensors: Tensors, said: Stated) -> Iterator[FoundWeight | str]:
        module: Any = import_module(f"skillvec.checkpoints.{file}")
        yield from getattr(module, name)(tensors, said)

    return find


FORMATS = {
    it.name: it for it in (
        QuantizedFormat("fp8", _later("quantized_formats", "find_fp8")),
        QuantizedFormat("mxfp8", _later("quantized_formats", "find_fp8")),
        QuantizedFormat("compressed-tensors", _later("quantized_compressed", "find_compressed")),
        QuantizedFormat("mxfp4", _later("quantized_formats", "find_mxfp4")),
        QuantizedFormat("mlx", _later("quantized_formats", "find_mlx"), _is_mlx),
        QuantizedFormat("torchao", _later("quantized_formats", "find_torchao")),
        QuantizedFormat("quanto", _later("quantized_formats", "find_quanto")),
    )
}  # fmt: skip
# what serves only kernels that compute in few bits
UNUSED = {
    "activations": (
        ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale",
        ".output_zero_point", "activation_scale",
    ),
    "the KV cache": (".q_scale", ".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point"),
}  # fmt: skip


def dequantised(
    tensors: Tensors,
    config: Mapping[str, Any],
    what: str,
    left_out: LeftOut = nothing_left_out,
    headers: Mapping[str, str] = {},
    shapes: Callable[[], Mapping[str, Index]] = dict,
) -> tuple[dict[str, Source], dict[str, str]]:
    """Return the tensors with quantised weights under their plain names, read dequantised.

    `tensors` have their safetensors dtypes, `config` is the parsed config.json, `what` names the
    checkpoint in errors. Weights get the config's dtype, bf16 where it has none. The second result
    says of each weight how it was quantised and of each tensor left out why. Reads headers only,
    but for the 16 bytes that tell the width of integers packed per channel. `headers` are the
    metadata of the files, in which torchao says what it wrote; `shapes` gives those of the model's
    weights, of which optimum-quanto's groups of 4 and 2 bits do not tell. What no config explains
    stays as it is where all of it is `left_out`. Raises FormatError for partners that are missing
    or do not fit, IncompatibleError for what is not taken.
    """
    stated = _settings_of(config, what)
    if stated is None:
        refuse_unexplained(tensors, config, what, left_out)
        return dict(tensors), {}
    method, settings = stated
    standing: dict[str, Source] = {}
    notes: dict[str, str] = {}
    problems, taken = [], set[str]()
    try:
        said = Stated(settings, _model_dtype(config), headers, shapes)
        for found in FORMATS[method].find(tensors, said):
            if isinstance(found, str):
                problems.append(found)
                continue
            names, source, note = found
            if source.name in notes or (source.name in tensors and source.name not in names):
                problems.append(f"{source.name}: also made by {names[0]}: which is the weight?")
            standing[names[0]], notes[source.name] = source, note
            taken.update(names)
    except IncompatibleError as error:
        raise IncompatibleError(f"{what}: {error}") from None
    result = _put_weights(tensors, standing, taken, notes)
    if not problems:
        left = [name for name in result if name.endswith(PARTNERS)]
        problems = [f"{name}: without the weight that it belongs to" for name in left]
    if problems:
        raise FormatError(f"{what}: {method} tensors that do not fit:\n{up_to_five(problems)}")
    refuse_unexplained(result, config, what, left_out)
    return result, notes


def _put_weights(
    tensors: Tensors, standing: Mapping[str, Source], taken: set[str], notes: dict[str, str]
) -> dict[str, Source]:
    """Return tensors with the weights of `standing` in place of what they take.

    `notes` are added on what is left out because it serves only kernels that compute in few bits.
    """
    result: dict[str, Source] = {}
    for name, tensor in tensors.items():
        uses = [use for use, ends in UNUSED.items() if name.endswith(ends)]
        if name in standing:
            result[standing[name].name] = standing[name]
        elif uses and name not in taken:
            notes[name] = f"not a weight: scales {uses[0]}"
        elif name not in taken:
            result[name] = tensor
    return result


def _settings_of(config: Mapping[str, Any], what: str) -> tuple[str, Mapping[str, Any]] | None:
    """Return the format that a config names and its settings; None where it names none.

    Raises IncompatibleError for one that is not known here, and for several.
    """
    nested = [value for value in config.values() if isinstance(value, dict)]
    entries = [c["quantization_config"] for c in (config, *nested) if c.get("quantization_config")]
    if not entries and _unnamed(config.get("quantization")):
        entries = [config["quantization"]]
    if not entries:
        return None
    settings = entries[0] if isinstance(entries[0], dict) else {"quant_method": f"{entries[0]}?"}
    method = str(settings.get("quant_method", _unnamed(settings) or "unnamed method"))
    if method not in FORMATS or any(entry != settings for entry in entries):
        raise IncompatibleError(
            f"{what}: quantised ({method[:40]}; {len(entries)} quantization_config), expected one"
            f" of {', '.join(FORMATS)}: dequantise the model with the library that made it, and"
            " save it, first"
        )
    return method, settings


def _unnamed(settings: object) -> str | None:
    """Return the format that is meant by settings that name no method."""
    return next((it.name for it in FORMATS.values() if it.is_meant(settings)), None)


def _model_dtype(config: Mapping[str, Any]) -> str:
    text = config.get("text_config")
    configs = (config, text) if isinstance(text, dict) else (config,)
    named = [c[key] for c in configs for key in ("dtype", "torch_dtype") if c.get(key) is not None]
    dtype = str(named[0]).removeprefix("torch.") if named else "bfloat16"
    if DTYPE_NAMES.get(dtype) not in FLOATS:
        raise IncompatibleError(
            f"config.json: dtype {dtype[:40]!r}, expected bfloat16, float16 or float32, in which to"
            " dequantise the weights"
        )
    return DTYPE_NAMES[dtype]
