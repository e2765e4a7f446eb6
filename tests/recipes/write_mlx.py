"""Writes data/mlx_*: layers that MLX quantises, and the weights that it dequantises.

    python tests/recipes/write_mlx.py [folder]

Needs mlx[cpu] in the version of requirements.txt, and numpy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx


def sample(*shape: int) -> mx.array:
    """Distinct entries in rows and columns of different scales."""
    rows, columns = (0.75 ** (mx.arange(side) % 5) for side in shape[-2:])
    return mx.random.normal(shape) * rows[:, None] * columns


def quantise(weight: mx.array, **settings: Any) -> tuple[dict[str, mx.array], mx.array]:
    """The tensors that MLX stores, and the weight that it dequantises in float32."""
    packed = mx.quantize(weight, **settings)
    parts = dict(zip(("weight", "scales", "biases"), packed, strict=False))
    wide = [
        part if part.dtype in (mx.uint32, mx.uint8) else part.astype(mx.float32) for part in packed
    ]
    if settings.get("mode", "affine") == "affine":
        return parts, mx.dequantize(*wide, **settings)
    return parts, mx.dequantize(*wide, **settings, dtype=mx.float32)


def save(folder: Path, layers: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes layers with the settings of mlx-lm."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{path}.{k}": one for path, (parts, _) in layers.items() for k, one in parts.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    expected = {f"{path}.weight": W for path, (_, W) in layers.items()}
    mx.save_safetensors(str(folder / "expected.safetensors"), expected)
    config = {"model_type": "llama", "quantization": settings, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write(folder: Path) -> None:
    mx.random.seed(0)
    affine = {
        "model.layers.0.q_proj": (4, 32, sample(5, 64).astype(mx.bfloat16)),
        "model.layers.0.k_proj": (3, 32, sample(4, 96).astype(mx.float16)),
        "model.layers.0.experts.up_proj": (6, 32, sample(2, 3, 64)),
        "model.embed_tokens": (8, 64, sample(3, 128)),
    }
    settings: dict[str, Any] = {"group_size": 32, "bits": 4, "mode": "affine"}
    layers = {}
    for path, (bits, size, weight) in affine.items():
        layers[path] = quantise(weight, bits=bits, group_size=size)
        if (bits, size) != (4, 32):
            settings[path] = {"group_size": size, "bits": bits}
    save(folder / "mlx_affine", layers, settings)
    for mode, size, bits in (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)):
        layers = {"layers.0.up_proj": quantise(sample(5, 64), mode=mode)}
        save(folder / f"mlx_{mode}", layers, {"group_size": size, "bits": bits, "mode": mode})


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
