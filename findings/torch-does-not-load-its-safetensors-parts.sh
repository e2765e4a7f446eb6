#!/usr/bin/env bash
# torch 2.13.0: no reader loads what FileSystemWriter saves with SerializationFormat.SAFETENSORS.
#
# The writer creates `.metadata` and `__0_0.distcp` as usual, and `__0_0.distcp` is a safetensors
# file. `.metadata` gives every tensor the offset 0 and its length in bytes, so FileSystemReader
# reads the beginning of the header as a file of torch.save. HuggingFaceStorageReader searches only
# for names that end in .safetensors. It loads the file after it is renamed.
#
# Seen with safetensors 0.8.0:
#     places: [('__0_0.distcp', 0, 48), ('__0_0.distcp', 0, 24)]
#     FileSystemReader: UnpicklingError
#     HuggingFaceStorageReader: RuntimeError; renamed: equal
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat

saved = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(6.0).reshape(2, 3)}
writer = dcp.FileSystemWriter("out", serialization_format=SerializationFormat.SAFETENSORS)
dcp.save(saved, storage_writer=writer)
places = pickle.loads(Path("out/.metadata").read_bytes()).storage_data.values()
print("places:", places := [(one.relative_path, one.offset, one.length) for one in places])


def load(reader: dcp.StorageReader) -> str:
    state = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    try:
        dcp.load(state, storage_reader=reader)
    except dcp.CheckpointException as error:
        (failure,) = (one[0] for one in error.failures.values())
        return type(failure).__name__
    return "equal" if all(torch.equal(state[n], saved[n]) for n in saved) else "different"


print("FileSystemReader:", first := load(dcp.FileSystemReader("out")))
second = load(dcp.HuggingFaceStorageReader("out"))
Path("out/__0_0.distcp").rename("out/part.safetensors")
third = load(dcp.HuggingFaceStorageReader("out"))
print(f"HuggingFaceStorageReader: {second}; renamed: {third}")
raise SystemExit(0 if first != "equal" and second != "equal" and third == "equal" else 1)
PYTHON
