#!/usr/bin/env bash
# Keras 3.15.1 cannot load a model with bfloat16 weights that it has saved as .h5.
#
# HDF5 has no type for bfloat16. In .keras and .weights.h5, Keras stores two opaque bytes per entry
# together with the dtype. In .h5, it stores only the bytes; the only warning is that the format is
# old. The file contains all bits: a program that knows the dtype can read them as pairs of bytes.
#
# Seen with torch 2.13.0, NumPy 2.4.6 and h5py 3.16.0, on a CPU:
#     a.keras: loaded, the same weights
#     a.h5: ValueError: Invalid dtype: void16
#     the bytes in a.h5, read as bfloat16: the same weights
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 keras==3.15.1 h5py==3.16.0 numpy==2.4.6
cd "$folder"
KERAS_BACKEND=torch "$folder/venv/bin/python" - <<'PYTHON'
import h5py
import keras
import ml_dtypes
import numpy as np

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16", name="d")])
weights = keras.ops.convert_to_numpy(model.layers[0].kernel)
model.save("a.keras")
model.save("a.h5")


def load(path: str) -> str:
    try:
        kernel = keras.models.load_model(path).layers[0].kernel
    except ValueError as error:
        return f"ValueError: {error}"
    same = np.array_equal(keras.ops.convert_to_numpy(kernel), weights)
    return f"loaded, {'the same' if same else 'other'} weights"


said = {path: load(path) for path in ("a.keras", "a.h5")}
for path, words in said.items():
    print(f"{path}: {words}")
with h5py.File("a.h5") as file:
    group = file["model_weights"]["d"]
    (name,) = [name for name in group.attrs["weight_names"] if "kernel" in str(name)]
    bits = group[name][()].view(ml_dtypes.bfloat16)
same = np.array_equal(bits, weights)
print(f"the bytes in a.h5, read as bfloat16: {'the same' if same else 'other'} weights")
as_seen = "same" in said["a.keras"] and "void16" in said["a.h5"] and same
raise SystemExit(0 if as_seen else 1)
PYTHON
