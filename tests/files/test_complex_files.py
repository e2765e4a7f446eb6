"""Complex tensors of files are measured as linear maps, and a repair leaves them unchanged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.weights.reasons import Reason


def drawn(*shape: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def saved(path: Path, content: dict[str, Tensor]) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_complex_weight_is_measured(tmp_path: Path, kind: str) -> None:
    """[[A, -B], [B, A]] has each singular value of A + iB twice."""
    C = drawn(6, 4)
    (row,) = wc.audit(saved(tmp_path / f"a.{kind}", {"l.weight": C})).findings
    A, B = C.real.double(), C.imag.double()
    both = torch.cat([torch.cat([A, -B], 1), torch.cat([B, A], 1)])
    sigma = torch.linalg.svdvals(both)[::2]
    assert (row.shape, row.dtype) == ((6, 4), "complex64")
    assert row.singular_values == pytest.approx(sigma.tolist())
    assert row.condition_number == pytest.approx(float(sigma[0] / sigma[-1]))


def test_complex_tensors_classified_like_real_ones(tmp_path: Path) -> None:
    content = {
        "conv.weight": drawn(4, 3, 3, 3),
        "experts.w": drawn(2, 3, 4),
        "freqs_cis": drawn(16, 4),
        "wide": drawn(3, 5, dtype=torch.complex128),
    }
    report = wc.audit(saved(tmp_path / "a.pt", content))
    labels = {f.label for f in report.findings}
    assert labels == {"conv.weight:kernel", "experts.w:0", "experts.w:1", "wide"}
    assert report.coverage.skipped["freqs_cis"].reason is Reason.constant
    assert report.coverage.parameter_share == 1


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_repair_leaves_complex_weight_unchanged(tmp_path: Path, kind: str) -> None:
    content = {"c": drawn(5, 4), "r": drawn(5, 4).real.contiguous()}
    path, fixed = saved(tmp_path / f"a.{kind}", content), tmp_path / f"b.{kind}"
    report = wc.repair(path, fixed, 1.1)
    assert [one.name for one in report.repairs] == ["r"]
    assert report.skipped["c"].reason is Reason.complex
    after = load_file(fixed) if kind == "safetensors" else torch.load(fixed)
    assert torch.equal(after["c"], content["c"])
    with pytest.raises(ValueError, match="c: complex: measured, but not repaired"):
        wc.repair(path, tmp_path / f"c.{kind}", 1.1, include=["c"])


def test_conjugate_and_negative_bits_are_read(tmp_path: Path) -> None:
    """A conjugate and its imaginary part share the memory of the original tensor."""
    C = drawn(4, 4)
    content = {"conjugate": C.conj(), "negative": drawn(4, 3).conj().imag}
    checkpoint = Checkpoint(saved(tmp_path / "a.pt", content))
    for one in checkpoint.matrices():
        assert torch.equal(one.read(), content[one.name])
    wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 1.1)
    fixed = torch.load(tmp_path / "b.pt")["negative"]
    assert float(wc.condition_number(fixed)) <= 1.1
    # The result is close to the original, not to its negative.
    assert float((fixed * content["negative"]).sum()) > 0


def test_two_real_columns_are_not_a_complex_number(tmp_path: Path) -> None:
    content = {"experts.w": drawn(3, 4, dtype=torch.float32).view(3, 2, 2)}
    report = wc.audit(saved(tmp_path / "a.pt", content))
    assert {(f.label, f.dtype) for f in report.findings} == {
        (f"experts.w:{number}", "float32") for number in range(3)
    }
