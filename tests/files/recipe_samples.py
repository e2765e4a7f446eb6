"""Small checkpoints of every format whose weights recipes build, also split over files.

tests/recipes/data contains the output of libraries; this module makes the rest.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from corpus import Sample, randn, saved
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

DATA = Path(__file__).parents[1] / "recipes" / "data"
LIGHTNING = Path(__file__).with_name("data") / "lightning"
_INDEX = "model.safetensors.index.json"
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "head_dim": 4,
}
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [8, 8]}
_PROJECTIONS = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}


def recipe_samples() -> dict[str, Sample]:
    """Returns the valid checkpoints by name."""
    written = {folder.name: _read(folder) for folder in sorted(DATA.iterdir())}
    layers = written["bitsandbytes_layers"].files["model.safetensors"]
    classes = written.pop("torchao").files, written.pop("torchao_older").files
    computed = _parametrized()
    return {
        **written,
        "torchao in pt": Sample("state.pt", {"state.pt": classes[0]["state.pt"]}),
        "torchao, older": Sample("state.pt", {"state.pt": classes[1]["state.pt"]}),
        "torchao in safetensors": Sample(
            "a.safetensors", {"a.safetensors": classes[0]["model.safetensors"]}
        ),
        "parametrized": Sample("a.safetensors", {"a.safetensors": save(computed)}),
        "parametrized in pt": Sample("a.pt", {"a.pt": saved(computed)}),
        "lightning, distributed": _read(LIGHTNING),
        "heads": _folder(_attention(), _BLOCKS),
        "shards of codes": _in_shards(written["gptq_v2"]),
        "slices of codes": _in_slices(),
        "distributed codes": _distributed(),
        "4 bits in pt": Sample("a.pt", {"a.pt": saved(load(layers))}),
        "4 bits in safetensors": Sample("a.safetensors", {"a.safetensors": layers}),
    }


def _read(folder: Path) -> Sample:
    """Reads the output of a library, without the expected weights."""
    files = {one.name: one.read_bytes() for one in sorted(folder.iterdir())}
    files.pop("expected.safetensors", None)
    return Sample("", files)


def _config(quantization: Mapping[str, Any]) -> bytes:
    return json.dumps(_CONFIG | {"quantization_config": quantization}).encode()


def _folder(tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> Sample:
    files = {"config.json": _config(quantization), "model.safetensors": save(dict(tensors))}
    return Sample("", files)


def _attention() -> dict[str, Tensor]:
    """Makes the layers of attention in float8, with scales per block."""
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": randn(12, 16)}
    for seed, (name, (m, n)) in enumerate(_PROJECTIONS.items()):
        weight = f"model.layers.0.self_attn.{name}.weight"
        tensors[weight] = randn(m, n, seed=seed).to(torch.float8_e4m3fn)
        tensors[f"{weight}_scale_inv"] = randn(m // 8, n // 8, seed=seed).abs() + 0.1
    return tensors


def _parametrized() -> dict[str, Tensor]:
    """Makes weights that torch computes from norms, a spectral norm or a mask."""
    names = parametrizations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecated functions
        layers = {
            "normed": names.weight_norm(nn.Linear(5, 4)),
            "normed_columns": names.weight_norm(nn.ConvTranspose1d(3, 4, 2), dim=1),
            "older_normed": nn.utils.weight_norm(nn.Linear(5, 4)),
            "spectral": names.spectral_norm(nn.Linear(9, 8)),
            "older_spectral": nn.utils.spectral_norm(nn.Conv2d(3, 8, 2)),
            "pruned": prune.random_unstructured(nn.Linear(5, 4), "weight", 0.3),
            "orthogonal": names.orthogonal(nn.Linear(4, 4)),
        }
    stored = nn.ModuleDict(layers).state_dict()
    for seed, tensor in enumerate(stored.values()):
        if tensor.ndim > 1 and tensor.is_floating_point() and tensor.shape != (4, 4):
            tensor.copy_(randn(*tensor.shape, seed=seed))
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def _in_shards(sample: Sample) -> Sample:
    """Splits the parts of each weight over two files with an index."""
    files = dict(sample.files)
    tensors = load(files.pop("model.safetensors"))
    shards: list[dict[str, Tensor]] = [{}, {}]
    for number, name in enumerate(sorted(tensors)):
        shards[number % 2][name] = tensors[name]
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    files[_INDEX] = json.dumps({"metadata": {"total_size": 9}, "weight_map": places}).encode()
    return Sample("", files | dict(zip(names, map(save, shards), strict=True)))


def _in_slices() -> Sample:
    """Makes halves of codes, scales and a plain weight, which the metadata of two files join."""
    whole = {**_attention(), "plain.weight": randn(6, 5)}
    files = {"config.json": _config(_BLOCKS)}
    for number in (0, 1):
        halves, offsets = {}, {}
        for name, tensor in whole.items():
            dim = 1 if name.endswith("o_proj.weight") else 0
            size = -(-tensor.shape[dim] // 2)
            if tensor.shape[dim] < 2 and number:
                continue
            start = number * size
            halves[name] = tensor.narrow(dim, start, min(size, tensor.shape[dim] - start)).clone()
            offsets[name] = {"saved_offsets": [start if side == dim else 0 for side in (0, 1)]}
        metadata = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)}
        file = f"shard-0000{number + 1}-model-00001-of-00001.safetensors"
        files[file] = save(halves, metadata)
    return Sample("", files)


def _distributed() -> Sample:
    """Makes a torch.distributed.checkpoint folder of one process."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing processes
        dcp.save({**_attention(), "norm.weight": randn(4)}, checkpoint_id=folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return Sample("", files | {"config.json": _config(_BLOCKS)})
