"""Writes data/bitsandbytes*: a GPT-2 that transformers quantises, and layers of bitsandbytes.

    python tests/recipes/write_bitsandbytes.py [folder]

Needs the packages in requirements.txt. Everything runs on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile functions that run only once

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel


def sample(*shape: int) -> Tensor:
    """Distinct entries in rows and columns of different scales."""
    *_, m, n = shape
    rows, columns = (0.75 ** (torch.arange(side) % 5) for side in (m, n))
    return torch.randn(shape) * rows[:, None] * columns


def dequantise(weight: Tensor, layer: nn.Module | None = None) -> Tensor:
    """A weight in float32, without the rounding to the dtype of the model.

    Uses the implementation for any device: the one for CPUs uses wrong scales if a block extends
    beyond its row (findings/bitsandbytes-blocks-across-rows.sh).
    """
    if isinstance(weight, bnb.nn.Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales)
    return dequantise_4bit(weight.data, weight.quant_state)


def dequantise_4bit(packed: Tensor, state: QuantState) -> Tensor:
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = packed.contiguous().view(torch.uint8).flatten()
    return _dequantize_4bit_compute(
        codes, absmax, state.code, state.blocksize, state.shape, torch.float32
    )


def write_model(folder: Path, config: GPT2Config, dtype: torch.dtype, **settings: object) -> None:
    """Writes a GPT-2, whose Conv1D layers transformers transposes before it quantises them."""
    with tempfile.TemporaryDirectory() as plain:
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = sample(*parameter.shape)
        model.save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(
            plain,
            quantization_config=BitsAndBytesConfig(**settings),
            device_map={"": "cpu"},
            dtype=dtype,
        )
    model.save_pretrained(folder)
    expected = {
        f"{path}.weight": dequantise(module.weight, module).T.contiguous()
        for path, module in model.named_modules()
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    }
    save_file(expected, folder / "expected.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)


def quantise(m: int, n: int, dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    """A 4-bit layer with m outputs and n inputs."""
    layer = bnb.nn.Linear4bit(n, m, bias=False, **settings)
    layer.weight.data = sample(m, n).to(dtype)
    return layer.to("cpu")


class Experts(nn.Module):
    """Experts in one 3-d parameter, quantised by bitsandbytes."""

    def __init__(self, b: int, m: int, n: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(sample(b, m, n), requires_grad=False)
        replace_parameter_4bit(self, "stack", compress_statistics=True, blocksize=32)


def write_layers(folder: Path, layers: nn.ModuleDict) -> None:
    """Writes the unchanged state dict of layers."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for path, layer in layers.items():
        if isinstance(layer, Experts):
            packed, (of,) = (
                layer.parametrizations["stack"].original,
                layer.parametrizations["stack"],
            )
            expected[f"{path}.stack"] = dequantise_4bit(packed, of.quant_state)
        else:
            expected[f"{path}.weight"] = dequantise(layer.weight)
    tensors = {name: tensor.contiguous() for name, tensor in layers.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, folder / "expected.safetensors")


def shrink(folder: Path) -> None:
    """Removes tensors that are not quantised and settings that no test reads."""
    tensors = load_file(folder / "model.safetensors")
    plain = (".ln_1.", ".ln_2.", ".ln_f.", ".wpe.", ".wte.", ".bias")
    kept = {name: one for name, one in tensors.items() if not any(p in name for p in plain)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    keys = ("architectures", "model_type", "dtype", "quantization_config")
    (folder / "config.json").write_text(
        json.dumps({key: config[key] for key in keys if key in config}, indent=1) + "\n"
    )


def write(folder: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=12, n_layer=1, n_head=2, n_inner=20, vocab_size=8, n_positions=8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    fsdp = {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16}
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **fsdp}
    write_model(folder / "bitsandbytes_nf4", config, torch.bfloat16, **settings)
    write_model(folder / "bitsandbytes_int8", config, torch.float16, load_in_8bit=True)
    shrink(folder / "bitsandbytes_nf4")
    shrink(folder / "bitsandbytes_int8")
    layers = nn.ModuleDict(
        {
            "odd": quantise(7, 11, quant_type="nf4", compress_statistics=False),
            "row": quantise(1, 70, torch.float16, quant_type="fp4", compress_statistics=False),
            "column": quantise(33, 1, quant_type="fp4"),
            "wide": quantise(
                4, 32, torch.bfloat16, quant_type="fp4", compress_statistics=False,
                quant_storage=torch.float32,
            ),
            "experts": Experts(3, 5, 9),
        }
    )  # fmt: skip
    write_layers(folder / "bitsandbytes_layers", layers)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
