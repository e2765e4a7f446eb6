"""Writes tests/files/data/keras: files of Keras, and the action of its layers.

    KERAS_BACKEND=torch python tests/files/write_keras.py [FOLDER]    # keras 3.15.1, h5py 3.16.0

`expected.safetensors` contains the matrix of each layer without its bias: the layer is applied to
the basis vectors of its smallest input. For recurrent layers, it contains an input and the output.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import torch
from keras import layers as L
from safetensors.torch import save_file

Arrays = dict[str, np.ndarray]


def act(layer: keras.Layer, *shape: int) -> np.ndarray:
    """Returns the matrix (outputs, inputs) of a layer for unbatched inputs of this shape."""
    basis = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    zero = np.zeros((1, *shape), "float32")
    values = [keras.ops.convert_to_numpy(layer(x)) for x in (basis, zero)]
    return (values[0] - values[1]).reshape(len(basis), -1).T


def convolutions() -> tuple[keras.Model, Arrays]:
    """Makes each kind of convolution, and a model within a model."""
    images, sound = keras.Input((9, 9, 4)), keras.Input((9, 4))
    made = {
        "grouped": L.Conv2D(6, (3, 2), groups=2, name="grouped"),
        "depthwise": L.DepthwiseConv2D(2, depth_multiplier=3, name="depthwise"),
        "separable": L.SeparableConv2D(5, 2, depth_multiplier=2, name="separable"),
        "transposed": L.Conv2DTranspose(3, (2, 3), name="transposed"),
        "line": L.Conv1D(5, 3, name="line"),
        "dense": L.Dense(7, name="dense"),
    }
    x = made["grouped"](images)
    x = L.BatchNormalization(name="norm")(x)
    for name in ("depthwise", "separable", "transposed"):
        x = made[name](x)
    inner = keras.Sequential([keras.Input((9, 4)), made["line"], L.Flatten()], name="inner")
    x = L.Concatenate()([L.Flatten()(x), inner(sound)])
    model = keras.Model([images, sound], L.Dense(2, name="last")(made["dense"](x)))
    shapes = {"grouped": (3, 2, 4), "depthwise": (2, 2, 6), "separable": (2, 2, 18)}
    shapes |= {"transposed": (1, 1, 5), "line": (3, 4)}
    expected = {name: act(made[name], *shape) for name, shape in shapes.items()}
    return model, expected | {"dense": act(made["dense"], made["dense"].kernel.shape[0])}


def sequences() -> tuple[keras.Model, Arrays]:
    """Makes attention, recurrent layers and layers with an einsum equation."""
    tokens = keras.Input((5,), dtype="int32")
    x = L.Embedding(9, 8, name="table")(tokens)
    attention = L.MultiHeadAttention(2, 3, name="attention")
    grouped = L.GroupQueryAttention(3, 4, 2, name="grouped")
    x = grouped(attention(x, x), x)
    einsum = L.EinsumDense("abc,dce->abde", (None, 2, 4), bias_axes="de", name="einsum")
    stack = L.EinsumDense("abc,bcd->abd", (5, 6), name="stack")
    x = stack(L.Reshape((5, 8))(einsum(x)))
    both = L.Bidirectional(L.LSTM(3, return_sequences=True), name="both")
    gru = L.GRU(4, return_sequences=True, name="gru")
    x = both(x)
    x = L.TimeDistributed(L.Dense(4, name="each"), name="steps")(x)
    cells = L.RNN([L.SimpleRNNCell(3), L.GRUCell(2)], return_sequences=True, name="cells")
    model = keras.Model(tokens, cells(gru(x)))
    model.compile("sgd", "mse")
    # After a step, the file contains an optimizer.
    model.fit(np.zeros((2, 5)), np.zeros((2, 5, 2)), verbose=0)
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape) / 2)
    expected = {"einsum": act(einsum, 1, 8), "stack": act(stack, 5, 8)}
    for name, layer in (("attention", attention), ("grouped", grouped)):
        for part in ("query", "key", "value", "output"):
            dense = getattr(layer, f"{part}_dense", None) or getattr(layer, f"_{part}_dense")
            inner = dense.kernel.shape[:2] if part == "output" else dense.kernel.shape[:1]
            called = "attention_output" if part == "output" else part
            expected[f"{name}/{called}"] = act(dense, 1, *inner)
    steps = random.normal(size=(1, 7, 6)).astype("float32")
    forward = both.forward_layer
    expected |= {"lstm.in": steps, "lstm.out": keras.ops.convert_to_numpy(forward(steps))}
    steps = steps[..., :4]
    expected |= {"gru.in": steps, "gru.out": keras.ops.convert_to_numpy(gru(steps))}
    return model, expected


class Own(keras.Model):
    """A subclassed model, whose layers no config describes."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.first = L.Dense(3)
        self.blocks = [L.Dense(4), L.Conv2D(2, 2)]
        self.a_patch = L.Conv2D(3, 2, name="patch_of_own")  # saved before `layers`
        self.table = self.add_weight(shape=(3, 4), name="table")

    def call(self, x: object) -> object:
        image = keras.ops.reshape(self.blocks[0](self.first(x)), (-1, 2, 2, 1))
        return (
            self.blocks[1](image) + keras.ops.sum(self.a_patch(image)) + keras.ops.sum(self.table)
        )


def write(folder: Path) -> None:
    keras.utils.set_random_seed(0)
    expected: Arrays = {}
    for make in (convolutions, sequences):
        model, actions = make()
        name = make.__name__
        model.save(folder / f"{name}.keras")
        model.save(folder / f"{name}.h5")
        expected |= {f"{name}/{layer}": matrix for layer, matrix in actions.items()}
    own = Own()
    own(np.zeros((1, 4)))
    own.save(folder / "own.keras")
    half = keras.Sequential([keras.Input((4,)), L.Dense(3, dtype="bfloat16", name="half")])
    half.save_weights(folder / "half.weights.h5")
    codes = keras.Sequential([keras.Input((4,)), L.Dense(3, name="codes")])
    codes.quantize("int8")
    codes.save(folder / "codes.keras")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in expected.items()}
    save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("data") / "keras"
    write(where)
