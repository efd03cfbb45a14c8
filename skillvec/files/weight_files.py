"""Which file names hold weights."""

import fnmatch
import posixpath

# files that look like weights, wherever they lie
WEIGHT_FILES = (
    "*.safetensors", "*.safetensors.index*.json", "*.bin", "*.bin.index*.json", "*.pt", "*.pth",
    "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.ot", "*.onnx", "*.onnx_data",
    "*.onnx.data", "*.tflite", "*.npz", "*.nemo", "*.distcp", ".metadata",
)  # fmt: skip
ARGUMENTS = "training_args.bin"  # a pickle of settings


def is_weight_file(name: str) -> bool:
    """Return whether a file of this name holds or indexes weights, or optimizer state."""
    base = posixpath.basename(name)
    return base != ARGUMENTS and any(fnmatch.fnmatch(base, glob) for glob in WEIGHT_FILES)
