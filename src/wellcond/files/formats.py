"""The format of a file, by its content or its name; of those not read the way to convert them."""

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
ZERO = "Convert it: python zero_to_fp32.py . out, in the folder in which that script lies"

_DEMAND = "a checkpoint in a format that is read"
_BLOBS = ".mlpackage/Data/com.apple.CoreML/weights"  # its weight.bin could be one of torch
# A part of the variables of TensorFlow has a name such as variables.data-00000-of-00001.
_PART, _PARTS = ".data-of", re.compile(r"\.data-\d+-of-\d+$")
_KERAS_2 = "of Keras 2 with tf_keras, and with TF_USE_LEGACY_KERAS=1 in the environment"

# By the ending of the name: what it is, and the way out.
_ENDINGS = {
    ".weights.json": (
        "the index of sharded weights of Keras",
        "Give its folder, in which these must lie.",
    ),
    ".tflite": ("a TensorFlow Lite model", f"{_TO_ONNX} --tflite PATH --output model.onnx."),
    ".pb": (
        "a TensorFlow graph",
        f"{_TO_ONNX} --saved-model FOLDER --output model.onnx, with the folder in which "
        f"saved_model.pb lies, or --graphdef PATH with --inputs and --outputs; {_KERAS_2}.",
    ),
    _PART: (
        "a part of a checkpoint of TensorFlow",
        f"{_TO_ONNX} --saved-model FOLDER --output model.onnx, with the folder in which "
        f"saved_model.pb lies; {_KERAS_2}.",
    ),
    ".mlmodel": ("a Core ML model", _EXPORT),
    ".mlpackage": ("a Core ML package", _CORE_ML),
    _BLOBS: ("the weights of a Core ML package", f"{_CORE_ML[:-1]}, with the path of the package."),
    ".distcp": (
        "a part of a checkpoint of torch.distributed.checkpoint",
        "Give its folder, in which .metadata must lie.",
    ),
    ".pte": ("an ExecuTorch program", _EXPORT),
    ".flatbuffer": (
        "a TorchScript program for mobile devices, stored as a flatbuffer",
        # The tensors lie in memory of the program, and end with it.
        "Save its weights: program = torch.jit.load(path); "
        "torch.save(program.state_dict(), other).",
    ),
    ".engine": ("an engine of TensorRT", _EXPORT),
}
# By the first bytes of the file, from a place on.
_BEGINNINGS = (
    (0, b"\x89HDF\r\n\x1a\n", ".h5"),
    (0, b"\x93NUMPY", ".npy"),
    (0, b"GGUF", ".gguf"),
    (4, b"TFL3", ".tflite"),
    (4, b"PTMF", ".flatbuffer"),
    (64, b"\xef\xbe\xad\xde", _BLOBS),
)


def ending_of(path: Path) -> str:
    """What the name of a file of this format ends in: by its content if that tells, or its name."""
    return _by_content(path) or path.name


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle does."""
    with path.open("rb") as file:
        return re.match(rb"\x80[\x02-\x05]", file.read(2)) is not None


def other_format(path: Path) -> str:
    """The name of a format that is not read and the way to convert it, or "" for other files."""
    name = _known_name(path)
    ending = _by_content(path) or next((end for end in _ENDINGS if name.endswith(end)), "")
    if ending not in _ENDINGS:
        return ""
    what, way_out = _ENDINGS[ending]
    return f"{path} must be {_DEMAND}, but is {what}. {way_out}"


def format_by_name(path: Path) -> str:
    """What a file of this name is, if it is one of another format; "" if it is not."""
    what, _ = _ENDINGS.get(Path(_known_name(path)).suffix, ("", ""))
    return what


def _known_name(path: Path) -> str:
    """The name in lower case, of a part without its number."""
    return _PARTS.sub(_PART, path.name.lower())


def _by_content(path: Path) -> str:
    """The ending that the name of such a file has; "" of no format that is known by its content."""
    with path.open("rb") as file:
        start = file.read(68)
    for at, mark, ending in _BEGINNINGS:
        if start[at:].startswith(mark):
            return ending
    if not start.startswith(b"PK"):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # what a damaged directory of the archive leads to
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
    return ""


def other_folder(path: Path) -> str:
    """The same of a folder; also of one of the folders in it, or in these."""
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
        return f"{path} must be {_DEMAND}, but is one of Orbax. {_ORBAX}"
    if ".metadata" in names:  # of what is read, and has no weights
        names = {name for name in names if not name.endswith(".distcp")}
    if names & {"latest", "zero_to_fp32.py"} and any(n.startswith("global_step") for n in names):
        return f"{path} must be {_DEMAND}, but is one of DeepSpeed. {ZERO}."
    files = (path / name for name in sorted(names) if format_by_name(Path(name)))
    return next((other_format(file) for file in files if file.is_file()), "")
