"""Weights that the libraries pack, in many shapes and settings."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support import build_all, content_from, content_of, load_expected, weights_of
from torch import Tensor

from wellcond.recipes.awq import find_awq
from wellcond.recipes.base import Finder
from wellcond.recipes.bitnet import find_bitnet
from wellcond.recipes.bitsandbytes import find_bitsandbytes
from wellcond.recipes.gptq import find_gptq
from wellcond.recipes.hqq import find_hqq
from wellcond.recipes.mlx import find_mlx
from wellcond.recipes.quanto import find_quanto

pytestmark = pytest.mark.libraries


@pytest.fixture(autouse=True)
def repeatable() -> None:
    torch.manual_seed(0)


def build(tensors: dict[str, Tensor], find: Finder, **settings: Any) -> Tensor:
    content = content_from(
        {f"l.{name}": one for name, one in tensors.items()},
        config={"quantization_config": settings},
    )
    (candidate,) = find(content)
    return build_all(candidate.make(), content)


def require(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(kind: str, nested: bool) -> None:
    require("bitsandbytes")
    import write_bitsandbytes as script
    from bitsandbytes.functional import dequantize_4bit

    shapes = [(1, 1), (1, 33), (33, 1), (3, 5), (7, 11), (64, 64), (40, 96), (130, 257), (512, 64)]
    storages = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
    for (m, n), block, storage in itertools.product(shapes, (32, 64, 256), storages):
        if -(-m * n // 2) % storage.itemsize:
            continue  # the library cannot store this
        W = script.sample(m, n).to(torch.bfloat16)
        layer = script.bnb.nn.Linear4bit(
            n, m, bias=False, quant_type=kind, compress_statistics=nested, quant_storage=storage
        )
        layer.weight.data, layer.weight.blocksize = W, block
        layer = layer.to("cpu")
        built = build(layer.state_dict(), find_bitsandbytes)
        assert torch.equal(built, script.dequantise(layer.weight))
        if n % block == 0:  # otherwise see findings/bitsandbytes-blocks-across-rows.sh
            state = layer.weight.quant_state
            assert torch.equal(built.bfloat16(), dequantize_4bit(layer.weight.data, state))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (40, 96)])
def test_eight_bits_of_bitsandbytes(shape: tuple[int, int]) -> None:
    require("bitsandbytes")
    import write_bitsandbytes as script

    layer = script.bnb.nn.Linear8bitLt(*shape[::-1], bias=False, has_fp16_weights=False)
    layer.weight.data = script.sample(*shape)
    layer = layer.to("cpu")
    built = build(layer.state_dict(), find_bitsandbytes)
    expected = script.dequantise(layer.weight, layer)
    torch.testing.assert_close(built, expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("order", ["in_order", "act_order"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_auto_gptq(bits: int, dtype: torch.dtype, order: str) -> None:
    require("auto_gptq", "transformers")
    import write_gptq as script

    for (m, n), size in itertools.product([(32, 32), (64, 96), (160, 256)], (32, 40, -1)):
        groups = getattr(script, order)(n, n if size == -1 else size)
        layer = script.sample_layer(m, n, bits, groups, lowest=1, dtype=dtype)
        tensors, expected = script.pack_auto_gptq(bits, size, *layer, groups)
        settings = {"bits": bits, "group_size": size, "desc_act": order == "act_order"}
        W = build(tensors, find_gptq, **settings)
        assert W.shape == (m, n)
        assert torch.equal(W.to(dtype), expected)
        if order == "in_order":
            del tensors["g_idx"]
            assert torch.equal(W, build(tensors, find_gptq, **settings))


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        *itertools.product(["gptq", "gptq_v2"], [2, 3, 4, 8]),
        *itertools.product(["gptq_p"], range(2, 9)),
    ],
)
def test_gptqmodel(kind: str, bits: int) -> None:
    require("gptqmodel", "logbar", "pcre", "device_smi")
    import write_gptq as script

    shapes = [(32, 64), (96, 160), *([(20, 72)] if bits in (2, 4, 8) else [])]
    for (m, n), size in itertools.product(shapes, (32, 64)):
        groups = script.act_order(n, size)
        layer = script.sample_layer(m, n, bits, groups, lowest=0)
        tensors, expected = script.pack_gptqmodel(bits, size, *layer, groups, kind)
        settings = script.describe_gptqmodel(kind, bits, size)
        assert torch.equal(build(tensors, find_gptq, **settings).half(), expected)


@pytest.mark.parametrize("kind", ["auto_round", "auto_round:auto_gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_auto_round(bits: int, kind: str) -> None:
    require("auto_round", "transformers")
    import write_gptq as script

    for (m, n), size in itertools.product([(32, 64), (96, 192)], (32, 64)):
        lowest = int(kind.endswith("gptq"))
        layer = script.sample_layer(m, n, bits, script.in_order(n, size), lowest)
        tensors, expected = script.pack_auto_round(bits, size, *layer, kind)
        settings = {"quant_method": "auto-round", "packing_format": kind, "bits": bits}
        W = build(tensors, find_gptq, group_size=size, **settings)
        assert torch.equal(W.half(), expected)


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_autoawq(version: str) -> None:
    require("awq")
    import write_awq as script

    for (m, n), size in itertools.product([(32, 128), (96, 256), (64, 640)], (32, 64, 128)):
        layer, s, z = script.sample_layer(m, n, 4, script.in_order(n, size), lowest=0)
        packed, expected = getattr(script, f"pack_{version}")(size, layer, s, z)
        settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": version}
        W = build(packed.state_dict(), find_awq, **settings)
        assert torch.equal(W.half(), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4, 5, 6, 8])
def test_hqq(bits: float, axis: int) -> None:
    require("hqq", "optimum")
    import write_layers as script

    for (m, n), dtype in itertools.product([(16, 64), (40, 96)], (torch.float16, torch.float32)):
        for view in (False, True):
            tensors, expected = script.pack_hqq(
                m, n, dtype, nbits=bits, group_size=16, axis=axis, view_as_float=view
            )
            assert torch.equal(build(tensors, find_hqq), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quanto(dtype: torch.dtype) -> None:
    require("hqq", "optimum")
    import write_layers as script

    kinds = (script.qint8, script.qfloat8_e4m3fn)
    for (m, n), kind in itertools.product([(1, 1), (1, 9), (9, 1), (40, 96)], kinds):
        tensors, expected = script.pack_quanto(m, n, dtype, kind)
        assert torch.equal(build(tensors, find_quanto), expected)


def test_bitnet() -> None:
    require("hqq", "optimum")
    import write_layers as script

    for m, n in [(4, 1), (8, 33), (128, 64)]:
        tensors, expected = script.pack_bitnet(m, n)
        built = build(tensors, find_bitnet, quant_method="bitnet")
        torch.testing.assert_close(built, expected, rtol=2**-22, atol=0)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_mlx(mode: str, tmp_path: Path) -> None:
    require("mlx")
    import write_mlx as script

    affine = itertools.product((2, 3, 4, 5, 6, 8), (32, 64, 128))
    other = [(8 if mode == "mxfp8" else 4, 16 if mode == "nvfp4" else 32)]
    settings = affine if mode == "affine" else other
    for (bits, size), shape in itertools.product(settings, [(1, 128), (7, 256), (3, 5, 384)]):
        for dtype in (script.mx.float32, script.mx.float16, script.mx.bfloat16):
            weight = script.sample(*shape).astype(dtype)
            layer = script.quantise(weight, bits=bits, group_size=size, mode=mode)
            described = {"bits": bits, "group_size": size, "mode": mode}
            script.save(tmp_path, {"l": layer}, described)
            (W,) = weights_of(content_of(tmp_path), find_mlx).values()
            (expected,) = load_expected(tmp_path).values()
            # With float32 scales, the product and the sum are rounded.
            rtol = 2**-20 if mode == "affine" and dtype is script.mx.float32 else 0
            torch.testing.assert_close(W, expected, rtol=rtol, atol=rtol)
