"""Recognises the format of a file, and explains how to convert a format that is not read."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

_EXPORT = "It is an export: audit the checkpoint that was exported, or its torch.nn.Module."
_TO_ONNX = "Convert it to ONNX: python -m tf2onnx.convert"
_CORE_ML = (
    "Save its weights: found = coremltools.optimize.coreml.get_weights_metadata("
    "coremltools.models.MLModel(path, skip_model_load=True), weight_threshold=0); "
    "numpy.savez(other, **{name: one.val for name, one in found.items()})."
)
_ORBAX = (
    "Convert it: tree = orbax.checkpoint.PyTreeCheckpointer().restore(path); "
    'open("other.msgpack", "wb").write(flax.serialization.msgpack_serialize(tree)).'
)
ZERO = "Convert it: run `python zero_to_fp32.py . out` in the folder that contains this script"

_DEMAND = "a checkpoint in a supported format"
_BLOBS = ".mlpackage/Data/com.apple.CoreML/weights"  # its weight.bin could be one of torch
# TensorFlow names a shard of its variables variables.data-00000-of-00001, for example.
_PART, _PARTS = ".data-of", re.compile(r"\.data-\d+-of-\d+$")
_KERAS_2 = "For a Keras 2 model, install tf_keras and set TF_USE_LEGACY_KERAS=1 in the environment"

# By the ending of the name: what the file is, and the remedy.
_ENDINGS = {
    ".weights.json": (
        "the index of sharded Keras weights",
        "Give the path of the folder that contains the shards.",
    ),
    ".tflite": ("a TensorFlow Lite model", f"{_TO_ONNX} --tflite PATH --output model.onnx."),
    ".pb": (
        "a TensorFlow graph",
        f"{_TO_ONNX} --saved-model FOLDER --output model.onnx, where FOLDER contains "
        f"saved_model.pb, or use --graphdef PATH with --inputs and --outputs. {_KERAS_2}.",
    ),
    _PART: (
        "a shard of a TensorFlow checkpoint",
        f"{_TO_ONNX} --saved-model FOLDER --output model.onnx, where FOLDER contains "
        f"saved_model.pb. {_KERAS_2}.",
    ),
    ".mlmodel": ("a Core ML model", _EXPORT),
    ".mlpackage": ("a Core ML package", _CORE_ML),
    _BLOBS: ("the weights of a Core ML package", f"{_CORE_ML[:-1]}, with the path of the package."),
    ".distcp": (
        "a shard of torch.distributed.checkpoint",
        "Give the path of its folder, which must contain .metadata.",
    ),
    ".pte": ("an ExecuTorch program", _EXPORT),
    ".flatbuffer": (
        "a TorchScript program for mobile devices, stored as a flatbuffer",
        # The program owns the memory of its tensors, so it must outlive them.
        "Save its weights: program = torch.jit.load(path); "
        "torch.save(program.state_dict(), other).",
    ),
    ".engine": ("a TensorRT engine", _EXPORT),
}
# The offset and the bytes by which a format is recognised, and its ending.
_BEGINNINGS = (
    (0, b"\x89HDF\r\n\x1a\n", ".h5"),
    (0, b"\x93NUMPY", ".npy"),
    (0, b"GGUF", ".gguf"),
    (4, b"TFL3", ".tflite"),
    (4, b"PTMF", ".flatbuffer"),
    (64, b"\xef\xbe\xad\xde", _BLOBS),
    (2, b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", ".pt"),  # torch.save before torch 1.6
)


def ending_of(path: Path) -> str:
    """Returns the ending of the format that the content shows, or else the name of the file."""
    return _by_content(path) or path.name


def is_pickle(path: Path) -> bool:
    """Returns whether a file begins like a pickle."""
    with path.open("rb") as file:
        return re.match(rb"\x80[\x02-\x05]", file.read(2)) is not None


def other_format(path: Path) -> str:
    """Explains how to convert a file whose format is not read; returns "" for other files."""
    name = _known_name(path)
    ending = _by_content(path) or next((end for end in _ENDINGS if name.endswith(end)), "")
    if ending not in _ENDINGS:
        return ""
    what, way_out = _ENDINGS[ending]
    return f"{path} must be {_DEMAND}, but is {what}. {way_out}"


def format_by_name(path: Path) -> str:
    """Describes a file with this name if its format is not read; returns "" otherwise."""
    what, _ = _ENDINGS.get(Path(_known_name(path)).suffix, ("", ""))
    return what


def _known_name(path: Path) -> str:
    """Returns the name in lower case, without the number of a shard."""
    return _PARTS.sub(_PART, path.name.lower())


def _by_content(path: Path) -> str:
    """Returns the ending of the format that the content shows, or "" if it shows none."""
    with path.open("rb") as file:
        start = file.read(68)
    for at, mark, ending in _BEGINNINGS:
        if start[at:].startswith(mark):
            return ending
    length = int.from_bytes(start[:8], "little")
    if re.match(rb"\{\s*[\"}]", start[8:]) and 8 + length <= path.stat().st_size:
        return ".safetensors"
    if not start.startswith(b"PK"):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged archive directory can raise anything
        return ""
    arrays = [name.endswith(".npy") for name in names if not name.endswith("/")]
    if arrays and all(arrays):
        return ".npz"
    if {"config.json", "metadata.json"} <= {*names} and any(n.endswith(".h5") for n in names):
        return ".keras"
    inner = {name.partition("/")[2] for name in names}
    if "archive_format" in inner or "serialized_exported_program.json" in names:
        return ".pt2"
    if {"data.pkl", "constants.pkl"} <= inner:
        return ".jit"
    if "data.pkl" in inner and not format_by_name(path):  # a .distcp shard may be such an archive
        return ".pt"
    return ""


def other_folder(path: Path) -> str:
    """Explains how to convert a folder, or a folder up to two levels below it, like a file."""
    below = sorted(one for depth in ("*", "*/*") for one in path.glob(depth) if one.is_dir())
    return next(filter(None, map(_folder, (path, *below))), "")


def _folder(path: Path) -> str:
    try:
        names = {one.name for one in path.iterdir()}
    except OSError:
        return ""
    if path.suffix == ".mlpackage":
        what, way_out = _ENDINGS[path.suffix]
        return f"{path} must be {_DEMAND}, but is {what}. {way_out}"
    if names & {"_METADATA", "manifest.ocdbt"}:
        return f"{path} must be {_DEMAND}, but is an Orbax checkpoint. {_ORBAX}"
    if ".metadata" in names:  # these files were read, and contain no weights
        names = {name for name in names if not name.endswith(".distcp")}
    if names & {"latest", "zero_to_fp32.py"} and any(n.startswith("global_step") for n in names):
        return f"{path} must be {_DEMAND}, but is a DeepSpeed checkpoint. {ZERO}."
    files = (path / name for name in sorted(names) if format_by_name(Path(name)))
    return next((other_format(file) for file in files if file.is_file()), "")
