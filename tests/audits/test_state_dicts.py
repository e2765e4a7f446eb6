"""A state dict in memory, of tensors or NumPy arrays, is audited like a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wellcond as wc


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "wte": nn.Embedding(12, 8),
        "conv": nn.Conv2d(3, 4, 3),
        "norm": nn.LayerNorm(8),
        "mlp": nn.Linear(8, 5),
        "head": nn.Linear(8, 12, bias=False),
    }
    net = nn.ModuleDict(layers)
    net["head"].weight = net["wte"].weight
    net["mlp"].register_buffer("tril", torch.ones(5, 5).tril())
    return net


def test_state_dict_matches_its_file(net: nn.Module, tmp_path: Path) -> None:
    state = net.state_dict()
    path = tmp_path / "net.pt"
    torch.save(state, path)
    of_file, of_dict = wc.audit(path), wc.audit(state)
    assert of_dict.findings == of_file.findings
    assert of_dict.coverage == of_file.coverage
    assert of_dict.source == "state dict"
    assert {one.name for one in of_dict.findings} == {"conv.weight", "mlp.weight"}
    assert str(of_dict.coverage.skipped["head.weight"]).startswith("tied to another")


def test_numpy_arrays_match_tensors(net: nn.Module) -> None:
    state = net.state_dict()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in state.items()}
    arrays["step"] = 7  # values that are not tensors are ignored, as in a file
    report = wc.audit(arrays)
    assert report.findings == wc.audit(state).findings
    assert report.coverage == wc.audit(state).coverage
    arrays["mlp.weight"] = np.asfortranarray(arrays["mlp.weight"]).astype(">f4")[::-1]
    arrays["mlp.weight"].flags.writeable = False
    flipped = wc.audit(arrays)  # rows in another order have the same singular values
    for one, other in zip(flipped.findings, report.findings, strict=True):
        assert one.condition_number == pytest.approx(other.condition_number, rel=1e-12)


def test_state_dict_is_not_changed(net: nn.Module) -> None:
    state = net.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    wc.audit(state, certify=True, curves=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


def test_codes_are_built_as_from_a_file(tmp_path: Path) -> None:
    """A weight of weight_norm is also several tensors in a state dict."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))
    (one,) = wc.audit(layer.state_dict()).findings
    kappa = float(wc.condition_number(layer.weight.detach()))
    assert one.condition_number == pytest.approx(kappa, rel=1e-5)
    assert len(one.parts) == 2


def test_tensors_without_entries_have_a_reason() -> None:
    state = {
        "a.weight": torch.eye(3),
        "meta.weight": torch.empty(3, 3, device="meta"),
        "sparse.weight": torch.eye(3).to_sparse(),
        "bits.weight": torch.ones(3, 3, dtype=torch.int32),
        "lazy.weight": nn.LazyLinear(2).weight,
        "half.weight": torch.eye(3).expand(3, 3)[:1].expand(3, 3),
    }
    coverage = wc.audit(state).coverage
    assert coverage.measured == 1
    assert coverage.skipped.keys() == state.keys() - {"a.weight"}


def test_nan_is_found_in_all_tensors() -> None:
    state = {"a.weight": np.eye(3), "a.bias": np.array([1.0, np.nan]), "b": np.ones(3)}
    assert list(wc.audit(state).not_finite) == ["a.bias"]


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"state_dict": {"w": torch.eye(2)}}, TypeError, "Pass the mapping that directly contains"),
        ({1: torch.eye(2)}, TypeError, "must map names to tensors, got a key"),
        ({"w": np.array([["a"]])}, TypeError, r'`model_or_path\["w"\]` must have a dtype'),
        ({"w": np.ma.ones((2, 2))}, TypeError, "must not be a masked array"),
        ({"w": np.eye(2, dtype=np.longdouble)}, TypeError, "float128|longdouble"),
        ({}, ValueError, "must contain a weight matrix that can be measured, but has none"),
        ({"b": torch.ones(3)}, ValueError, "b: not a matrix: a vector"),
    ],
)
def test_invalid_state_dict_is_refused(
    state: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        wc.audit(state)


@pytest.mark.parametrize("array", [np.eye(2), torch.eye(2), np.float64(3)])
def test_error_for_single_array_shows_mapping(array: Any) -> None:
    with pytest.raises(TypeError, match=r'Give the array a name: \{"weight": array\}'):
        wc.audit(array)
    with pytest.raises(TypeError, match=r"names to tensors, got list\.$"):
        wc.audit([array])


def test_error_for_nested_state_dict_joins_names() -> None:
    state = {"a": {"w": np.eye(2)}, "b": {"w": np.diag([9.0, 1.0])}}
    with pytest.raises(TypeError, match="join their names") as error:
        wc.audit(state)
    code = str(error.value).partition("join their names: ")[2].removesuffix(".")
    report = eval(code, {"wc": wc, "state": state})
    assert {one.name: one.condition_number for one in report.findings} == {"a.w": 1, "b.w": 9}
    with pytest.raises(TypeError, match=r"contains the weights\.$"):
        wc.audit({"a": [np.eye(2)]})


def test_example_requires_a_model() -> None:
    model_of_keras = type("Model", (), {"__module__": "keras.src.models.model"})()
    with pytest.raises(TypeError, match="got a model of Keras"):
        wc.audit(model_of_keras)
    with pytest.raises(TypeError, match="`example` requires a model"):
        wc.audit({"w": torch.eye(2)}, example=torch.zeros(1, 2))


def test_heads_require_a_model() -> None:
    """A state dict does not contain the number of heads."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    state = {f"layers.0.self_attn.{name}.weight": torch.eye(4) for name in names}
    (first, *_) = wc.audit(state, heads=True).findings
    assert first.label == "layers.0.self_attn:heads"
    assert "the number of its heads is unknown" in first.explanation


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64])
def test_matrix_functions_accept_arrays(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    S = rng.standard_normal((2, 5, 4)).astype(dtype)
    T = torch.from_numpy(S)
    S.flags.writeable = False
    for function, more in [
        (wc.condition_number, ()),
        (wc.nearest, (2.0,)),
        (wc.condition_penalty, ()),
        (wc.condition_penalty_gradient, ()),
        (wc.condition_penalty_bound, ()),
        (wc.proximal_step, (0.1,)),
    ]:
        found, expected = function(S, *more), function(T, *more)
        assert isinstance(found, np.ndarray)
        assert isinstance(expected, torch.Tensor)
        assert found.dtype == expected.numpy().dtype
        np.testing.assert_array_equal(found, expected.numpy())
    assert isinstance(wc.condition_number(S[0]), np.float64)
    assert wc.certify(S[0]) == wc.certify(T[0])


def test_transposed_array() -> None:
    S = np.diag([4.0, 2.0, 1.0])[:, ::-1]
    assert wc.condition_number(S.T) == pytest.approx(4.0)
    assert 4.0 in wc.certify(S).condition_number
    np.testing.assert_array_equal(wc.nearest(S, 10.0), S)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
@pytest.mark.parametrize("function", [wc.certify, wc.condition_number, wc.condition_penalty])
def test_arrays_of_codes_are_refused(function: Any, dtype: Any) -> None:
    with pytest.raises(TypeError, match="codes"):
        function(np.eye(2, dtype=dtype))
