"""Files and folders of other formats: what they are called, and how their weights are converted."""

from __future__ import annotations

import zipfile
from pathlib import Path

_SAVE = "safetensors.torch.save_file"
_FLAT = f"save it with {_SAVE}({{name: torch.from_numpy(a) for name, a in arrays.items()}}, other)"
_NUMPY = f"Load it with numpy.load and {_FLAT}."
_ONNX = (
    "Convert it: arrays = {t.name: onnx.numpy_helper.to_array(t).copy() for t in "
    f"onnx.load(path).graph.initializer}}, then {_FLAT}. Names and layouts are those of the "
    "export: prefer the checkpoint that was exported."
)
_KERAS = (
    "Load the model, take arrays = {v.path: numpy.array(v) for v in model.weights}, and "
    f"{_FLAT}. Kernels of Keras are (in, out) and (height, width, in, out): transpose them."
)
_EXPORT = "It is an export: audit the checkpoint that was exported, or its torch.nn.Module."
ZERO = "Convert it: python zero_to_fp32.py . out, in the folder in which that script lies"

_DEMAND = "a checkpoint of torch or safetensors"

# By the ending of the name: what it is, and the way out.
_ENDINGS = {
    ".npz": ("an archive of NumPy", _NUMPY),
    ".npy": ("an array of NumPy", _NUMPY),
    ".keras": ("a model of Keras", _KERAS),
    ".h5": ("an HDF5 file, as Keras writes them", _KERAS),
    ".hdf5": ("an HDF5 file, as Keras writes them", _KERAS),
    ".onnx": ("an ONNX model", _ONNX),
    ".tflite": ("a TensorFlow Lite model", _EXPORT),
    ".pb": ("a TensorFlow graph", _EXPORT),
    ".mlmodel": ("a Core ML model", _EXPORT),
    ".mlpackage": ("a Core ML package", _EXPORT),
    ".gguf": (
        "a GGUF file of llama.cpp",
        "Its weights are usually quantised: audit the checkpoint that was converted.",
    ),
    ".msgpack": (
        "a msgpack file, as Flax writes them",
        "Restore it with flax.serialization.msgpack_restore, flatten it with "
        f"flax.traverse_util.flatten_dict(tree, sep='/'), and {_FLAT}.",
    ),
    ".distcp": (
        "a part of a checkpoint of torch.distributed.checkpoint",
        "Give its folder, in which .metadata must lie.",
    ),
    ".pte": ("an ExecuTorch program", _EXPORT),
    ".pt2": ("a program of torch.export", "Save torch.export.load(path).state_dict instead."),
    ".engine": ("an engine of TensorRT", _EXPORT),
    ".jit": (
        "a TorchScript program",
        "Save its weights: torch.save(torch.jit.load(path).state_dict(), other).",
    ),
}
# By the first bytes of the file, from a place on.
_BEGINNINGS = (
    (0, b"\x89HDF\r\n\x1a\n", ".h5"),
    (0, b"\x93NUMPY", ".npy"),
    (0, b"GGUF", ".gguf"),
    (4, b"TFL3", ".tflite"),
)


def other_format(path: Path) -> str:
    """The name of a format that is not read and the way to convert it, or "" for other files."""
    ending = _by_content(path) or path.suffix.lower()
    if ending not in _ENDINGS:
        return ""
    what, way_out = _ENDINGS[ending]
    return f"{path} must be {_DEMAND}, but is {what}. {way_out}"


def format_by_name(path: Path) -> str:
    """What a file of this name is, if it is one of another format; "" if it is not."""
    what, _ = _ENDINGS.get(path.suffix.lower(), ("", ""))
    return what


def _by_content(path: Path) -> str:
    """The ending that the name of such a file has; "" of no format that is known by its content."""
    with path.open("rb") as file:
        start = file.read(16)
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
    if names and all(name.endswith(".npy") for name in names):
        return ".npz"
    if {"config.json", "metadata.json"} <= {*names} and any(n.endswith(".h5") for n in names):
        return ".keras"
    if any(name.partition("/")[2] == "archive_format" for name in names):
        return ".pt2"
    return ""


def other_folder(path: Path) -> str:
    """The same of a folder; also of one of the folders in it."""
    below = sorted(one for one in path.iterdir() if one.is_dir())
    return next(filter(None, map(_folder, (path, *below))), "")


def _folder(path: Path) -> str:
    try:
        names = {one.name for one in path.iterdir()}
    except OSError:
        return ""
    if ".metadata" in names:  # of what is read, and has no weights
        names = {name for name in names if not name.endswith(".distcp")}
    if names & {"latest", "zero_to_fp32.py"} and any(n.startswith("global_step") for n in names):
        return f"{path} must be {_DEMAND}, but is one of DeepSpeed. {ZERO}."
    files = (path / name for name in sorted(names) if Path(name).suffix in _ENDINGS)
    return next((other_format(file) for file in files if file.is_file()), "")
