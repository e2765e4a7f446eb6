"""Writes tests/files/data/flax: files of Flax, and the action of its layers.

    python tests/files/write_flax.py [FOLDER]    # flax 0.12.8, jax 0.10.2, optax 0.2.8

The singular values are those of the action of each layer without its bias, which is applied to the
identity. Strides equal the lengths of windows, so that a convolution uses each input once.
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

KEY = jax.random.PRNGKey(0)
SOURCE = np.random.default_rng(0)
LAYERS, HEADS, SIZE, WIDTH = 3, 2, 4, 6
values: dict[str, list[float]] = {}


def drawn(tree):
    """Returns values for all arrays of a tree."""
    return jax.tree.map(lambda a: SOURCE.standard_normal(a.shape).astype("float32"), tree)


def parameters_of(layer, *inputs):
    """Returns nonzero parameters without compiling a layer."""
    return drawn(jax.eval_shape(layer.init, KEY, *inputs)["params"])


def measure(label, layer, parameters, *shape):
    """Records the singular values of the action of a layer on inputs of this shape."""
    identity = np.eye(np.prod(shape), dtype="float32")
    inputs = np.concatenate([identity, 0 * identity[:1]]).reshape(-1, *shape[1:])
    outputs = np.asarray(layer.apply({"params": parameters}, inputs), "float64")
    action = (outputs[:-1] - outputs[-1]).reshape(len(identity), -1)
    found = np.linalg.svd(action, compute_uv=False)
    values[f"params/{label}"] = found[found > 1e-6 * found[0]].tolist()


def conv(kind, features, window, **settings):
    return kind(features, window, strides=window, padding="VALID", **settings)


def alone(tree):
    """Single layers."""
    for name, layer, shape in (
        ("Conv_0", conv(nn.Conv, 5, (2, 2)), (1, 2, 2, 3)),
        ("Conv_1", conv(nn.Conv, 5, (3,)), (1, 3, 4)),
        ("Conv_2", conv(nn.Conv, 5, (2, 2, 2), use_bias=False), (1, 2, 2, 2, 3)),
        ("ConvTranspose_0", conv(nn.ConvTranspose, 5, (2, 2)), (1, 1, 1, 6)),
        ("ConvTranspose_1", conv(nn.ConvTranspose, 5, (3,)), (1, 1, 6)),
        (
            "ConvTranspose_2",
            conv(nn.ConvTranspose, 5, (2, 2), transpose_kernel=True),
            (1, 1, 1, 6),
        ),
        ("Dense_0", nn.Dense(4), (1, 7)),
        ("qkv", nn.DenseGeneral((3, HEADS, SIZE)), (1, WIDTH)),
    ):
        tree[name] = parameters_of(layer, np.zeros(shape, "float32"))
        measure(f"{name}/kernel", layer, tree[name], *shape)
    state, x = np.zeros((1, 5), "float32"), np.zeros((1, 4), "float32")
    for name, cell, carry in (
        ("OptimizedLSTMCell_0", nn.OptimizedLSTMCell(5), (state, state)),
        ("GRUCell_0", nn.GRUCell(5), state),
    ):
        tree[name] = parameters_of(cell, carry, x)
        for gate, one in tree[name].items():
            layer = nn.Dense(5, use_bias="bias" in one)
            measure(f"{name}/{gate}/kernel", layer, one, 1, one["kernel"].shape[0])


class Block(nn.Module):
    """Attention and an MLP."""

    bias: bool

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * SIZE, out_features=WIDTH, use_bias=self.bias
        )(y)
        return nn.Dense(WIDTH, use_bias=self.bias)(y), None


def measure_block(name, parameters, bias, suffix=""):
    attention = parameters["MultiHeadDotProductAttention_0"]
    above = f"{name}/MultiHeadDotProductAttention_0"
    for part in ("query", "key", "value"):
        layer = nn.DenseGeneral((HEADS, SIZE), use_bias=bias)
        measure(f"{above}/{part}/kernel{suffix}", layer, attention[part], 1, WIDTH)
    layer = nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=bias)
    measure(f"{above}/out/kernel{suffix}", layer, attention["out"], 1, HEADS, SIZE)
    layer = nn.Dense(WIDTH, use_bias=bias)
    measure(f"{name}/Dense_0/kernel{suffix}", layer, parameters["Dense_0"], 1, WIDTH)


def blocks(tree):
    """A single block, layers of nn.scan, and an ensemble of nn.vmap."""
    x = np.zeros((1, 3, WIDTH), "float32")
    tree["Block_0"] = parameters_of(Block(bias=True), x)
    measure_block("Block_0", tree["Block_0"], bias=True)
    settings = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    for name, bias in (("encoderblock", True), ("ScanBlock_0", False)):
        layers = nn.scan(Block, length=LAYERS, **settings)(bias=bias)
        tree[name] = parameters_of(layers, x, None)
        for number in range(LAYERS):
            one = jax.tree.map(lambda a, number=number: a[number], tree[name])
            measure_block(name, one, bias, f":{number}")
    critics = nn.vmap(nn.Dense, in_axes=None, axis_size=2, **settings)(5)
    tree["VmapCritic_0"] = parameters_of(critics, np.zeros((1, 4), "float32"))
    for number in range(2):
        one = jax.tree.map(lambda a, number=number: a[number], tree["VmapCritic_0"])
        measure(f"VmapCritic_0/kernel:{number}", nn.Dense(5), one, 1, 4)


def write(folder: Path) -> None:
    tree: dict = {}
    alone(tree)
    blocks(tree)
    tree["Embed_0"] = {"embedding": drawn(np.zeros((9, 4)))}
    tree["BatchNorm_0"] = drawn({"scale": np.zeros(4), "bias": np.zeros(4)})
    dense = tree["Dense_0"]
    state = {
        "step": 3,
        "params": tree,
        "batch_stats": {"BatchNorm_0": drawn({"mean": np.zeros((2, 4)), "var": np.zeros((2, 4))})},
        "opt_state": optax.adam(0.1).init(dense),
        "rng": jax.random.key_data(KEY),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.msgpack").write_bytes(serialization.to_bytes(state))
    (folder / "opt_state.msgpack").write_bytes(serialization.to_bytes(state["opt_state"]))
    others = {
        "bfloat16": dense["kernel"].astype(jnp.bfloat16),
        "float32": dense["kernel"],
        "complex": np.array([[9, 1j], [0, 1]], "complex64"),
        "native": 1 + 2j,
        "scalar": np.float32(3),
        "text": "text",
        "none": None,
        "empty": np.zeros((0, 3), "float32"),
        "float8": dense["kernel"].astype(jnp.float8_e3m4),
        "list": [dense["kernel"], {"kernel": dense["kernel"].T}],
    }
    serialization.MAX_CHUNK_SIZE = 48  # the default is 1 GB
    (folder / "chunked.msgpack").write_bytes(serialization.to_bytes(others))
    (folder / "array.msgpack").write_bytes(serialization.to_bytes(np.diag([9.0, 1.0])))
    kernel = np.asarray(dense["kernel"]).tolist()
    text = json.dumps({"singular values": values, "kernel": kernel}, indent=0)
    (folder / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("data") / "flax")
