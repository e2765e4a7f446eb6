"""Weights of torchao's classes in safetensors and pickles, compared with torchao."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import build_all, content_from, load_expected, reason_of, weights_of
from torch import Tensor

from wellcond.files.pickled import Pickled
from wellcond.files.safetensors import Safetensors
from wellcond.files.tensors import TensorFile
from wellcond.recipes.base import Candidate, Content, TensorClass
from wellcond.recipes.find import find_recipes
from wellcond.recipes.torchao import find_torchao

DATA = Path(__file__).parent / "data"


def content_of_file(file: TensorFile) -> Content:
    tensors = {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()}
    return Content(tensors, file.read, classes=file.classes)


def check(content: Content, folder: Path, count: int) -> None:
    """Entries are equal except for the order of two products in float32."""
    found, expected = weights_of(content, find_torchao), load_expected(folder)
    assert len(found) == count
    for name, W in found.items():
        exact = "nvfp4" not in name
        torch.testing.assert_close(
            W, expected[name].to(W.dtype), rtol=0 if exact else 2**-23, atol=0
        )
    recipes, refused = find_recipes(content)
    assert recipes.keys() == found.keys()
    assert not refused


def test_every_entry_of_safetensors_equals_torchao() -> None:
    check(content_of_file(Safetensors(DATA / "torchao/model.safetensors")), DATA / "torchao", 9)


def test_every_entry_of_pickle_equals_torchao() -> None:
    check(content_of_file(Pickled(DATA / "torchao/state.pt")), DATA / "torchao", 3)


def test_pickles_and_safetensors_have_the_same_names_and_settings() -> None:
    files = Safetensors(DATA / "torchao/model.safetensors"), Pickled(DATA / "torchao/state.pt")
    described, pickled = (file.classes for file in files)
    for name, one in pickled.items():
        assert one.kind == described[name].kind
        assert one.parts == described[name].parts
        # JSON stores enumeration members by name, a pickle stores them by value.
        settings = {**described[name].attributes, **one.attributes}
        del settings["shape"]
        assert settings.keys() - described[name].attributes.keys() <= {
            "act_quant_scale",
            "act_quant_zero_point",
            "act_pre_scale",
        }
        for key in described[name].attributes.keys() - {"kernel_preference"}:
            assert one.attributes[key] == described[name].attributes[key], key
        assert all(part in files[1].entries for part in one.parts.values())
    whole = Safetensors(DATA / "torchao/model.safetensors").classes["mxfp8.weight"]
    assert whole.attributes["elem_dtype"] == "float8_e4m3fn"
    assert whole.attributes["kernel_preference"] == ["KernelPreference", "AUTO"]
    assert whole.attributes["act_quant_kwargs"] == "QuantizeTensorToMXKwargs"


def check_older(folder: Path) -> None:
    """Checks all weights except one that packs bits, which is refused."""
    content = content_of_file(Pickled(folder / "state.pt"))
    classes = {name: one for name, one in content.classes.items() if name != "uintx.weight"}
    check(Content(content.tensors, content.read, classes=classes), folder, len(classes))
    candidate = next(one for one in find_torchao(content) if one.label == "uintx.weight")
    assert candidate.parts[0] == "uintx._weight_tensor_impl_int_data_int4_shard"
    assert reason_of(candidate, content) == (
        "the layout of torchao's 'UintxAQTTensorImpl' is unknown"
    )
    assert find_recipes(content)[1].keys() == {candidate.parts[0]}


def test_older_class_is_read_and_packed_bits_are_refused() -> None:
    check_older(DATA / "torchao_older")


# --- files of installed libraries -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("scale", [2, 32])
def test_every_entry_equals_torchao_at_other_sizes(scale: int, tmp_path: Path) -> None:
    pytest.importorskip("torchao", minversion="0.15")
    import write_torchao

    write_torchao.write(tmp_path, scale)
    for file in (Safetensors(tmp_path / "model.safetensors"), Pickled(tmp_path / "state.pt")):
        check(content_of_file(file), tmp_path, 9)


@pytest.mark.slow
@pytest.mark.libraries
def test_every_entry_of_older_class_equals_torchao(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao")
    if hasattr(torchao.quantization, "Int8Tensor"):
        pytest.skip("this torchao no longer has AffineQuantizedTensor")
    import write_torchao

    write_torchao.write_older(tmp_path, 4)
    check_older(tmp_path)


@pytest.mark.slow
@pytest.mark.libraries
def test_stacks_and_other_elements_equal_torchao(tmp_path: Path) -> None:
    """Experts (E, m, n), float6, scales without tiles, one factor per expert."""
    pytest.importorskip("torchao", minversion="0.15")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor

    W = torch.randn(3, 128, 96, generator=torch.Generator().manual_seed(0))
    W *= torch.logspace(-1, 1, 128)[:, None] * torch.logspace(-2, 0, 3)[:, None, None]
    made: dict[str, Tensor] = {}
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2):
        for tiled, size in ((True, 32), (False, 32), (False, 16)):
            stack = W if kind != torch.float8_e5m2 else W[0]
            made[f"l.{kind}_{tiled}_{size}".replace("torch.", "")] = MXTensor.to_mx(
                stack, kind, size, is_swizzled_scales=tiled
            )
    for kind in ("fp6_e2m3", "fp6_e3m2"):
        made[f"l.{kind}"] = MXTensor.to_mx(W[1], kind, 32)
    for tiled in (True, False):
        factor = torch.tensor([0.5, 3.0, 0.1]).view(3, 1, 1)
        made[f"l.nvfp4_{tiled}"] = NVFP4Tensor.to_nvfp4(
            W, per_tensor_scale=factor, is_swizzled_scales=tiled
        )
    made["l.int8"] = Int8Tensor.from_hp(W, PerRow())
    made["l.int8_tensor"] = Int8Tensor.from_hp(W, PerTensor())
    made["l.float8"] = Float8Tensor.from_hp(W)
    made["l.float8_tensor"] = Float8Tensor.from_hp(W[2], granularity=PerTensor())
    torch.save(made, tmp_path / "a.pt")
    content = content_of_file(Pickled(tmp_path / "a.pt"))
    found = weights_of(content, find_torchao)
    assert found.keys() == made.keys()
    for name, one in made.items():
        torch.testing.assert_close(found[name], one.dequantize(torch.float32), rtol=2**-23, atol=0)


@pytest.mark.slow
@pytest.mark.libraries
def test_factors_of_inputs_are_applied() -> None:
    """`dequantize` omits the factors, but the layer multiplies its input by them."""
    pytest.importorskip("torchao", minversion="0.15")
    from torchao.quantization import Int8Tensor, PerRow

    factors = torch.logspace(-1, 1, 24)
    one = Int8Tensor.from_hp(torch.randn(6, 24), PerRow(), act_pre_scale=factors)
    parts = {"qdata": one.qdata, "scale": one.scale, "act_pre_scale": factors}
    content = described("Int8Tensor", parts, block_size=[1, 24])
    W = build_all(the_candidate(content).make(), content)
    acts = torch.nn.functional.linear(torch.eye(24), one).mT
    torch.testing.assert_close(W, acts, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.libraries
def test_weight_of_smoothquant_is_close_to_the_original(tmp_path: Path) -> None:
    pytest.importorskip("torchao", minversion="0.15")
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False))
    W = model[0].weight.detach().clone()
    base = Int8DynamicActivationInt8WeightConfig()
    quantize_(model, SmoothQuantConfig(base, "prepare"))
    model(torch.randn(64, 32) * torch.logspace(-1.5, 1.5, 32))
    quantize_(model, SmoothQuantConfig(base, "convert"))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    content = content_of_file(Pickled(tmp_path / "a.pt"))
    (found,) = weights_of(content, find_torchao).values()
    assert (found - W).norm() < 0.05 * W.norm() < (model[0].weight.dequantize() - W).norm()


@pytest.mark.slow
@pytest.mark.libraries
def test_shards_of_transformers_describe_their_weights(tmp_path: Path) -> None:
    pytest.importorskip("torchao", minversion="0.15")
    transformers = pytest.importorskip("transformers", minversion="5")
    from torchao.quantization import Int8WeightOnlyConfig
    from write_mxfp4 import small_llama

    small_llama(64, 96).save_pretrained(tmp_path / "plain")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain",
        dtype=torch.bfloat16,
        quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()),
    )
    quantised.save_pretrained(tmp_path / "codes", max_shard_size="8KB")
    files = [Safetensors(path) for path in sorted((tmp_path / "codes").glob("*.safetensors"))]
    assert len(files) > 1
    where = {name: file for file in files for name in file.entries}
    content = Content(
        {
            name: (file.entries[name].shape, file.entries[name].dtype)
            for name, file in where.items()
        },
        lambda name, rows=None: where[name].read(name, rows),
        classes={name: one for file in files for name, one in file.classes.items()},
    )
    found = weights_of(content, find_torchao)
    state = quantised.state_dict()
    wanted = {name for name, one in state.items() if type(one).__name__ == "Int8Tensor"}
    assert found.keys() == wanted
    for name in wanted:
        assert torch.equal(found[name], state[name].dequantize(torch.float32))


# --- parts that do not fit ------------------------------------------------------------------------


def described(kind: str, parts: Mapping[str, Tensor], **settings: Any) -> Content:
    content = content_from({f"l._weight_{part}": one for part, one in parts.items()})
    one = TensorClass(kind, {part: f"l._weight_{part}" for part in parts}, settings)
    return Content(content.tensors, content.read, classes={"l.weight": one})


def the_candidate(content: Content) -> Candidate:
    (candidate,) = find_torchao(content)
    return candidate


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )


INT8 = {"qdata": codes(4, 6), "scale": torch.rand(4, 2), "zero_point": codes(4, 2)}
FLOAT8 = {"qdata": codes(4, 6).view(torch.float8_e4m3fn), "scale": torch.rand(4, 1)}
FLOAT4 = {"qdata": codes(4, 16).view(torch.uint8), "scale": codes(4, 1).view(torch.uint8)}
NVFP4 = {
    "qdata": codes(4, 16).view(torch.uint8),
    "scale": codes(4, 2).view(torch.float8_e4m3fn),
    "per_tensor_scale": torch.tensor(0.5),
}
MX: dict[str, Any] = {"elem_dtype": "float4_e2m1fn_x2", "block_size": 32}
GROUPS: dict[str, Any] = {"block_size": [1, 3]}
OLDER = {f"tensor_impl.{part}": one for part, one in INT8.items() if part != "qdata"}
OLDER["tensor_impl.int_data"] = INT8["qdata"]
PLAIN: dict[str, Any] = {
    "tensor_impl": "PlainAQTTensorImpl",
    "zero_point_domain": ["ZeroPointDomain", 1],
    "block_size": [1, 3],
}


def but(parts: Mapping[str, Tensor], **changed: Tensor | None) -> dict[str, Tensor]:
    return {name: one for name, one in (dict(parts) | changed).items() if one is not None}


def test_by_hand() -> None:
    content = described("Int8Tensor", INT8, **GROUPS)
    W = build_all(the_candidate(content).make(), content)
    for i, j in ((0, 0), (3, 5), (2, 2), (1, 3)):
        q, z, s = (
            int(INT8["qdata"][i, j]),
            int(INT8["zero_point"][i, j // 3]),
            INT8["scale"][i, j // 3],
        )
        assert float(W[i, j]) == pytest.approx((q - z) * float(s), rel=1e-6)
    older = described("AffineQuantizedTensor", OLDER, **PLAIN)
    assert torch.equal(build_all(the_candidate(older).make(), older), W)
    inner = {f"original_weight_tensor.{part}": one for part, one in OLDER.items()}
    settings = {f"original_weight_tensor.{key}": value for key, value in PLAIN.items()}
    wrapped = described(
        "LinearActivationQuantizedTensor",
        inner,
        original_weight_tensor="AffineQuantizedTensor",
        shape=[4, 6],
        **settings,
    )
    assert torch.equal(build_all(the_candidate(wrapped).make(), wrapped), W)
    none = described(
        "AffineQuantizedTensor", OLDER, **PLAIN | {"zero_point_domain": ["ZeroPointDomain", 3]}
    )
    recipe = the_candidate(none).make()
    assert set(recipe.parts) == set(none.tensors)
    expected = INT8["qdata"] * INT8["scale"].repeat_interleave(3, 1)
    torch.testing.assert_close(build_all(recipe, none), expected)


REFUSED: dict[str, tuple[str, Mapping[str, Tensor], dict[str, Any], str]] = {
    "another class": (
        "Int4TilePackedTo4dTensor",
        INT8,
        GROUPS,
        "torchao's Int4TilePackedTo4dTensor is",
    ),
    "a class within a class": (
        "LinearActivationQuantizedTensor",
        OLDER,
        {"original_weight_tensor": "Int4Tensor"},
        "the layout of torchao's LinearActivationQuantizedTensor is unknown",
    ),
    "no codes": ("Int8Tensor", but(INT8, qdata=None), GROUPS, "its qdata is missing"),
    "no scales": ("Int8Tensor", but(INT8, scale=None), GROUPS, "its scale is missing"),
    "no block size": ("Int8Tensor", INT8, {}, "block_size = None is not one size per side"),
    "three block sizes": ("Int8Tensor", INT8, {"block_size": [1, 1, 3]}, "not one size per side"),
    "an enormous block size": (
        "Int8Tensor",
        INT8,
        {"block_size": [1, 1 << 62]},
        "does not divide the shape",
    ),
    "a block size of zero": (
        "Int8Tensor",
        INT8,
        {"block_size": [0, 3]},
        "does not divide the shape",
    ),
    "a text as block size": (
        "Int8Tensor",
        INT8,
        {"block_size": ["1", "3"]},
        "does not divide the shape",
    ),
    "a true block size": (
        "Int8Tensor",
        INT8,
        {"block_size": [True, 3]},
        "does not divide the shape",
    ),
    "other blocks": (
        "Int8Tensor",
        INT8,
        {"block_size": [1, 2]},
        "has the shape (4, 2), not (4, 3)",
    ),
    "truncated scales": ("Int8Tensor", but(INT8, scale=torch.rand(3, 2)), GROUPS, "not (4, 2)"),
    "truncated zeros": ("Int8Tensor", but(INT8, zero_point=codes(2)), GROUPS, "not (4, 2)"),
    "scales of integers": (
        "Int8Tensor",
        but(INT8, scale=codes(4, 2).view(torch.uint8)),
        GROUPS,
        "has the dtype uint8, not float64 or",
    ),
    "codes of another dtype": (
        "Int8Tensor",
        but(INT8, qdata=codes(4, 6).int()),
        GROUPS,
        "has the dtype int32, not int8",
    ),
    "codes of four sides": (
        "Int8Tensor",
        but(INT8, qdata=codes(1, 1, 4, 6)),
        GROUPS,
        "neither a matrix nor a stack",
    ),
    "no entries": ("Int8Tensor", but(INT8, qdata=codes(0, 6)), GROUPS, "neither a matrix nor"),
    "another shape": (
        "Int8Tensor",
        INT8,
        GROUPS | {"shape": [6, 4]},
        "its codes have the shape (4, 6), but its shape is [6, 4]",
    ),
    "factors of other inputs": (
        "Int8Tensor",
        but(INT8, act_pre_scale=torch.rand(4)),
        GROUPS,
        "has the shape (4,), not (6,)",
    ),
    "float8, other scales": (
        "Float8Tensor",
        but(FLOAT8, scale=torch.rand(3, 1)),
        {},
        "block_size = None is not one",
    ),
    "MX, no element": ("MXTensor", FLOAT4, {"block_size": 32}, "its elem_dtype None is unknown"),
    "MX, other element": (
        "MXTensor",
        FLOAT4,
        MX | {"elem_dtype": [1]},
        "its elem_dtype [1] is unknown",
    ),
    "MX, blocks of nothing": (
        "MXTensor",
        FLOAT4,
        MX | {"block_size": 0},
        "does not divide 32 inputs",
    ),
    "MX, a list of sizes": (
        "MXTensor",
        FLOAT4,
        MX | {"block_size": [1, 32]},
        "does not divide 32 inputs",
    ),
    "MX, larger blocks": ("MXTensor", FLOAT4, MX | {"block_size": 64}, "does not divide 32 inputs"),
    "MX, other scales": ("MXTensor", FLOAT4, MX | {"block_size": 16}, "has the shape (4, 1), not"),
    "MX, in tiles": ("MXTensor", FLOAT4, MX | {"is_swizzled_scales": True}, "not (32, 16)"),
    "MX, real scales": (
        "MXTensor",
        but(FLOAT4, scale=torch.rand(4, 1)),
        MX,
        "has the dtype float32, not float8_e8m0fnu or uint8",
    ),
    "MX, transposed": ("MXTensor", FLOAT4, MX | {"shape": [8, 16]}, "but its shape is [8, 16]"),
    "MX, float8": (
        "MXTensor",
        FLOAT4,
        MX | {"elem_dtype": "float8_e4m3fn"},
        "has the dtype uint8, not float8_e4m3fn",
    ),
    "MX, float6": (
        "MXTensor",
        FLOAT4,
        MX | {"elem_dtype": "fp6_e2m3", "block_size": 16},
        "more than 63",
    ),
    "MX, tiles of several": (
        "MXTensor",
        {"qdata": codes(2, 4, 16).view(torch.uint8), "scale": codes(2, 32, 16).view(torch.uint8)},
        MX | {"is_swizzled_scales": True},
        "a tile of its scales covers several matrices of 4 rows",
    ),
    "a part that is not known": (
        "Int8Tensor",
        but(INT8, _pre_scale=torch.rand(6)),
        GROUPS,
        "the effect of its part '_pre_scale' is unknown",
    ),
    "NVFP4, factors under an older name": (
        "NVFP4Tensor",
        but(NVFP4, per_tensor_scale=None, _per_tensor_scale=torch.tensor(2.0)),
        {"block_size": 16},
        "the effect of its part '_per_tensor_scale' is unknown",
    ),
    "NVFP4, factors": (
        "NVFP4Tensor",
        but(NVFP4, per_tensor_scale=torch.rand(4)),
        {"block_size": 16},
        "does not have one factor per matrix",
    ),
    "older, other layout": (
        "AffineQuantizedTensor",
        OLDER,
        PLAIN | {"tensor_impl": "TensorCoreTiledAQTTensorImpl"},
        "the layout of torchao's 'TensorCoreTiledAQTTensorImpl'",
    ),
    "older, no layout": (
        "AffineQuantizedTensor",
        OLDER,
        PLAIN | {"tensor_impl": ["x"]},
        "torchao's ['x'] is unknown",
    ),
    "older, added zeros": (
        "AffineQuantizedTensor",
        OLDER,
        PLAIN | {"zero_point_domain": ["ZeroPointDomain", 2]},
        "the domain ['ZeroPointDomain', 2] of its zero points",
    ),
    "older, transposed": (
        "AffineQuantizedTensor",
        OLDER,
        PLAIN | {"tensor_impl.transposed": True},
        "its codes are transposed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_fit_give_a_reason(case: str) -> None:
    kind, parts, settings, expected = REFUSED[case]
    content = described(kind, parts, **settings)
    candidate = the_candidate(content)
    assert set(candidate.parts) == set(content.tensors)
    reason = reason_of(candidate, content)
    assert expected in reason
    assert "\n" not in reason


def test_plain_tensor_of_same_name_gives_a_reason() -> None:
    content = described("Int8Tensor", INT8, **GROUPS)
    tensors = {**content.tensors, "l.weight": ((2, 2), "float32")}
    content = Content(tensors, content.read, classes=content.classes)
    assert "is also stored as a plain tensor" in reason_of(the_candidate(content), content)


def test_class_without_tensors_is_not_a_candidate() -> None:
    one = TensorClass("Int8Tensor", {"qdata": "a", "scale": "b"}, {"block_size": [1, 3]})
    assert not list(find_torchao(Content({}, torch.empty, classes={"l.weight": one})))


# --- damaged descriptions -------------------------------------------------------------------------


def of_metadata(tmp_path: Path, **texts: str) -> dict[str, TensorClass]:
    save_file({"l._weight_qdata": codes(4, 6)}, tmp_path / "a.safetensors", texts)
    return Safetensors(tmp_path / "a.safetensors").classes


def test_metadata_of_torchao_are_read(tmp_path: Path) -> None:
    data = {"block_size": [1, 6], "dtype": {"_type": "torch.dtype", "_data": "float32"}}
    one = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
    names = json.dumps(["l.weight", "l.bias", 3, "missing"])
    found = of_metadata(
        tmp_path,
        **{"tensor_names": names, "l.weight": json.dumps(one), "l.bias": '{"_type": "Tensor"}'},
    )
    parts = {"qdata": "l._weight_qdata", "scale": "l._weight_scale"}
    settings = {"block_size": [1, 6], "dtype": "float32"}
    assert found == {"l.weight": TensorClass("Int8Tensor", parts, settings)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "[" * 100_000,
        '{"_type": 3, "_data": {}, "_tensor_data_names": []}',
        '{"_type": "a\\n", "_data": {}, "_tensor_data_names": []}',
        '{"_type": "Int8Tensor", "_data": [], "_tensor_data_names": []}',
        '{"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": {"a": 1}}',
        '{"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": [["qdata"]]}',
    ],
)
def test_damaged_metadata_are_ignored(tmp_path: Path, text: str) -> None:
    assert of_metadata(tmp_path, tensor_names='["l.weight"]', **{"l.weight": text}) == {}
    assert of_metadata(tmp_path, tensor_names=text, **{"l.weight": "{}"}) == {}


def test_invalid_settings_are_omitted(tmp_path: Path) -> None:
    deep: Any = {}
    for _ in range(50):
        deep = {"_type": "x", "_data": deep}
    data = {
        "a": [[1]],
        "b": 10**400,
        "c": {"_data": 1},
        "d": deep,
        "e": ["x" * 999] * 99,
        "f": True,
    }
    one = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["qdata"]}
    (found,) = of_metadata(
        tmp_path, tensor_names='["l.weight"]', **{"l.weight": json.dumps(one)}
    ).values()
    assert found.attributes == {
        "a": [None],
        "b": None,
        "c": [None, 1],
        "d": "x",
        "e": None,
        "f": True,
    }
