"""Kernels in files: which shapes are kernels, the order of their axes, and which are guesses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.operators.views import shares_memory
from wellcond.weights.fused import find_views_in_file
from wellcond.weights.matrices import ViewsByName

Shape = tuple[int, ...]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def seen(name: str, shape: Shape, **beside: Shape) -> tuple[dict[str, Shape], str]:
    """The matrices in a tensor by their views, and the note."""
    stem = name[: name.rfind(".") + 1]
    shapes = {name: shape} | {f"{stem}{own}": other for own, other in beside.items()}
    views = find_views_in_file(shapes, {})[name]
    matrices = ViewsByName(views.views)(torch.zeros(shape))
    return {view: tuple(S.shape) for view, S in matrices.items()}, views.note


# --- a file and its model -------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: nn.Conv1d(8, 12, 3),
    "Conv1d, square": lambda: nn.Conv1d(16, 16, 5),
    "Conv1d, one entry wide": lambda: nn.Conv1d(32, 48, 1),
    "Conv1d, first": lambda: nn.Conv1d(1, 64, 31),
    "Conv1d, long": lambda: nn.Conv1d(6, 10, 40),
    "Conv1d without bias": lambda: nn.Conv1d(16, 32, 3, bias=False),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(32, 16, 8),
    "ConvTranspose1d, square": lambda: nn.ConvTranspose1d(16, 16, 4),
    "ConvTranspose1d, more outputs": lambda: nn.ConvTranspose1d(8, 24, 4),
    "Conv2d": lambda: nn.Conv2d(3, 8, 5),
    "Conv2d, small": lambda: nn.Conv2d(2, 3, 7),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(12, 6, 4),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(4, 6, 2),
    "Bilinear": lambda: nn.Bilinear(16, 16, 5),
    "Linear": lambda: nn.Linear(8, 3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_kernel_in_file_matches_its_model(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]())
    torch.save(model.state_dict(), tmp_path / "a.pt")
    of_model, of_file = (wc.audit(one).findings for one in (model, tmp_path / "a.pt"))
    assert [f.label for f in of_file] == [f.label for f in of_model]
    for one, other in zip(of_file, of_model, strict=True):
        assert one.shape == other.shape
        assert one.condition_number == pytest.approx(other.condition_number, rel=1e-12)


def test_nearly_equal_rows_of_conv1d_are_repaired(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(64, 64, 3))
    with torch.no_grad():
        model[0].weight[0] = model[0].weight[1] * (1 + 1e-4)
    path, fixed = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(model.state_dict(), path)
    (row,) = wc.audit(path).findings
    assert row.label == "0.weight:kernel"
    assert row.condition_number == pytest.approx(1e8, rel=0.5)
    assert wc.audit(path).exceeding(100) == [row]
    wc.repair(path, fixed, 2.0)
    after = torch.load(fixed)["0.weight"].flatten(1)
    assert float(wc.condition_number(after)) <= 2.0


# --- names and shapes -----------------------------------------------------------------------------

# Shape, shape of the bias, and note; names of HiFi-GAN, VITS, FCPE, PESTO and guided diffusion.
KERNELS: dict[str, tuple[Shape, Shape | None, str]] = {
    "ups.0.weight": ((512, 256, 16), (256,), ""),
    "text_encoder.project.weight": ((384, 192, 1), (384,), ""),
    "decoder.upsampler.0.weight": ((32, 16, 16), (16,), ""),
    "input_blocks.3.1.qkv.weight": ((96, 32, 1), (96,), ""),
    "net.1.weight": ((64, 32, 3), (64,), "nn.Bilinear also has a bias"),
    "layers.0.net.4.weight": ((64, 64, 3), (64,), "Conv1d or a ConvTranspose1d"),
    "blocks.0.2.weight": ((64, 1, 31), (64,), "as one group"),
    "post.weight": ((1, 32, 7), (1,), "nn.Bilinear also has a bias"),
    "mix.weight": ((48, 32, 1), None, "guessed from its shape"),
    "depthwise.weight": ((64, 1, 3), None, "guessed from its shape; read as one group"),
    "up.weight": ((64, 8, 16), (32,), "a transposed convolution of 4 groups"),
    "encoder.filterbank._filters": ((512, 1, 16), None, "guessed from its shape"),
    "x.weight": ((128, 80, 64), (128,), "nn.Bilinear also has a bias"),
    "some_kernels": ((8, 6, 3, 3), None, "guessed from its shape"),
    "conv.weight": ((8, 6, 3), None, ""),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_one_matrix(name: str) -> None:
    shape, bias, note = KERNELS[name]
    rows, said = seen(name, shape, **({} if bias is None else {"bias": bias}))
    columns = torch.Size(shape[1:]).numel()
    assert rows == {"kernel": (shape[0], columns)}
    assert (note in said) if note else not said


STACKS: dict[str, tuple[Shape, Shape | None, str]] = {
    "experts.weight": ((4, 32, 16), None, ""),
    "moe.w1": ((64, 32, 16), None, ""),
    "layers.weight": ((4, 32, 16), (4, 32), ""),
    "pair.weight": ((5, 16, 16), (5,), "guessed from its square slices"),
    "bilinear.weight": ((8, 6, 7), (8,), ""),
    "w_q": ((16, 128, 64), None, "guessed from its shape"),
    "heads.weight": ((4, 32, 16), None, "guessed from its shape"),
    "one": ((1, 32, 16), None, ""),
}


@pytest.mark.parametrize("name", STACKS)
def test_stack_is_split(name: str) -> None:
    shape, bias, note = STACKS[name]
    rows, said = seen(name, shape, **({} if bias is None else {"bias": bias}))
    assert rows == {str(i): shape[1:] for i in range(shape[0])}
    assert (note in said) if note else not said


# --- inputs first ---------------------------------------------------------------------------------

# Shape, number of input axes, and note.
INPUTS_FIRST: dict[str, tuple[Shape, int, str]] = {
    "conv2d/kernel": ((3, 3, 64, 128), 3, ""),
    "conv2d/kernel:0": ((3, 3, 8, 16), 3, ""),
    "params.Conv_0.kernel": ((1, 1, 8, 16), 3, ""),
    "conv3d.kernel": ((3, 3, 3, 4, 8), 4, ""),
    "params.Conv_1.kernel": ((4, 3, 3, 4, 8), 4, "it is a stack"),
    "conv1d.kernel": ((5, 8, 16), 2, ""),
    "sep.pointwise_kernel": ((1, 1, 8, 16), 3, ""),
    "sep.depthwise_kernel": ((3, 3, 8, 2), 2, "as one group"),
    "dense.kernel": ((20, 30), 1, ""),
    "lstm.recurrent_kernel": ((8, 32), 1, ""),
    "attention.query.kernel": ((12, 3, 4), 1, ""),
    "attention.out.kernel": ((3, 4, 12), 2, ""),
    "layers.mlp.kernel": ((6, 16, 32), 2, "it may be a stack"),
    "vars.0": ((3, 3, 16, 32), 3, "guessed from its shape"),
}


@pytest.mark.parametrize("name", INPUTS_FIRST)
def test_kernels_of_keras_and_flax_have_inputs_first(name: str) -> None:
    shape, inputs, note = INPUTS_FIRST[name]
    views = find_views_in_file({name: shape}, {})[name]
    tensor = drawn(*shape)
    ((_, S),) = ViewsByName(views.views)(tensor).items()
    rows = torch.Size(shape[inputs:]).numel()
    # Entry by entry: the first axes are the columns, and writing changes the tensor.
    assert torch.equal(S, tensor.reshape(-1, rows).mT)
    assert shares_memory(S, tensor)
    assert (note in views.note) if note else not views.note
    (view,) = views.views.values()
    new = drawn(*S.shape)
    view.write_(tensor, new)
    assert torch.equal(S, new)


def test_depthwise_kernel_matches_torch() -> None:
    kernel = drawn(3, 3, 8, 2)
    views = find_views_in_file({"c.depthwise_kernel": (3, 3, 8, 2)}, {})["c.depthwise_kernel"]
    of_torch = kernel.permute(2, 3, 0, 1).reshape(16, 1, 3, 3)
    assert torch.equal(ViewsByName(views.views)(kernel)["kernel"], of_torch.flatten(1))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv.weight", (3, 3, 16, 32)),  # like a patch embedding with three channels
        ("patch_embed.proj.weight", (8, 3, 16, 16)),
        ("x.weight", (64, 32, 3, 3)),
        ("x.weight", (1, 1, 16, 32)),
    ],
)
def test_weight_has_outputs_first(name: str, shape: Shape) -> None:
    rows, _ = seen(name, shape)
    assert rows == {"kernel": (shape[0], torch.Size(shape[1:]).numel())}


def test_kernel_of_another_library_can_have_outputs_first() -> None:
    rows, note = seen("blur.kernel", (64, 32, 3, 3))
    assert rows == {"kernel": (64, 288)}
    assert "guess" in note


def test_kernels_with_inputs_first_are_measured_and_repaired(tmp_path: Path) -> None:
    path, fixed = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    content = {"conv2d/kernel": drawn(3, 3, 6, 8), "dense/kernel": drawn(5, 9), "x": drawn(3, 3)}
    save_file(content, path)
    found = {f.label: f for f in wc.audit(path).findings}
    of_torch = content["conv2d/kernel"].permute(3, 2, 0, 1).flatten(1).contiguous()
    row = found["conv2d/kernel:kernel"]
    assert row.shape == (8, 54)
    assert row.condition_number == pytest.approx(float(wc.condition_number(of_torch)))
    assert found["dense/kernel"].shape == (9, 5)
    wc.repair(path, fixed, 1.1, exclude=["x"])
    after = load_file(fixed)
    flat = after["conv2d/kernel"].permute(3, 2, 0, 1).flatten(1).contiguous()
    assert float(wc.condition_number(flat)) <= 1.1
    assert float(wc.condition_number(after["dense/kernel"])) <= 1.1
    assert torch.equal(after["x"], content["x"])


@pytest.mark.parametrize(
    ("name", "bias"),
    [("moe.experts.wi.kernel", None), ("scan/mlp/kernel", None), ("layers.mlp.kernel", (6, 32))],
)
def test_stacked_flax_kernels_are_split(name: str, bias: Shape | None) -> None:
    """nn.scan and mixtures of experts store (layers, inputs, outputs)."""
    rows, note = seen(name, (6, 16, 32), **({} if bias is None else {"bias": bias}))
    assert rows == {str(i): (32, 16) for i in range(6)}
    assert not note


@pytest.mark.parametrize(
    ("name", "shape", "bias", "order", "rows"),
    [
        ("ConvTranspose_0/kernel", (2, 3, 4, 5), (5,), (2, 0, 1, 3), 4),
        ("ConvTranspose/kernel", (3, 4, 5), (5,), (1, 0, 2), 4),
        ("ConvTranspose_0/kernel", (2, 3, 5, 4), (5,), (3, 0, 1, 2), 4),  # transpose_kernel
        ("layers/query/kernel", (2, 6, 3, 4), (2, 3, 4), (0, 2, 3, 1), 12),
        ("scan/query/kernel", (2, 6, 3, 4), None, (0, 2, 3, 1), 12),
        ("layers/out/kernel", (2, 3, 4, 6), (2, 6), (0, 3, 1, 2), 6),
        ("layers/out/kernel", (4, 3, 4, 6), (4, 6), (0, 3, 1, 2), 6),  # also its last two sides
        ("layers/Conv_0/kernel", (2, 3, 3, 4, 5), (2, 5), (0, 4, 1, 2, 3), 5),
        ("qkv/kernel", (6, 3, 2, 4), (3, 2, 4), (1, 2, 3, 0), 24),
    ],
)
def test_flax_kernels_are_read_and_written_entry_by_entry(
    name: str, shape: Shape, bias: Shape | None, order: Shape, rows: int
) -> None:
    """Transposed convolutions have their inputs as rows; layers of a scan are a stack."""
    beside = {} if bias is None else {name.replace("kernel", "bias"): bias}
    (view,) = find_views_in_file({name: shape} | beside, {})[name].views.values()
    tensor = drawn(*shape)
    S = view(tensor)
    stack = shape[:1] if order[0] == 0 else ()
    assert torch.equal(S, tensor.permute(order).reshape(*stack, rows, -1))
    new = drawn(*S.shape)
    view.write_(tensor, new)
    assert torch.equal(view(tensor), new)


@pytest.mark.parametrize(
    ("shape", "bias", "rows"),
    [
        ((11, 11, 3, 8), (8,), (8, 363)),
        ((7, 7, 3, 6), None, (6, 147)),  # a window of seven, and few channels
        ((3, 3, 64, 32), None, (32, 576)),
    ],
)
def test_kernel_by_name_has_inputs_first(shape: Shape, bias: Shape | None, rows: Shape) -> None:
    found, note = seen("conv2d.kernel", shape, **({} if bias is None else {"bias": bias}))
    assert found == {"kernel": rows}
    assert not note


def test_square_window_at_the_end_is_recognised() -> None:
    assert seen("filters", (3, 1, 7, 7))[0] == {"kernel": (3, 49)}
