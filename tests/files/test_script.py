"""TorchScript archives: tensors equal those of torch.jit.load, and their roles are known."""

import enum
import filecmp
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from corpus import CODES, records, zipped
from safetensors.torch import save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.cli import main
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import NoTensorsError, UnreadableError
from wellcond.weights.reasons import Reason, Skipped


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """TorchScript is deprecated."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@torch.jit.script
class Box:
    def __init__(self, held: Tensor) -> None:
        self.held = held


class Holder(nn.Module):
    """A value that can be an attribute of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 2)
        self.register_buffer("basis", torch.randn(5, 6))
        self.register_buffer("passing", torch.randn(5, 6), persistent=False)
        self.listed: list[Tensor] = [torch.randn(2, 2), torch.randn(3, 3)]
        self.by_name: dict[str, Tensor] = {"a": torch.randn(2, 3)}
        self.perhaps: Tensor | None = torch.randn(2, 5)
        self.plain = torch.randn(3, 2)
        self.counts: list[int] = [1, 2, 3]
        self.colour = Colour.RED
        self.box = Box(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.colour == Colour.BLUE:
            x = x + self.box.held.sum() + self.by_name["a"].sum()
        return self.conv(x).sum() + self.basis.sum() + self.listed[0].sum() + self.counts[0]


class Model(nn.Module):
    """Layers of many kinds and dtypes, with tied, transposed and nested weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)
        self.nested = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), Holder())
        self.tied = nn.Linear(4, 5, bias=False)
        self.tied.weight = self.linear.weight
        self.again = self.linear
        self.narrow = nn.Linear(2, 2).half()
        self.wide = nn.Linear(2, 2).bfloat16()
        self.lstm = nn.LSTM(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.image = nn.Conv2d(2, 3, 3)
        self.several = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])
        self.norm = nn.BatchNorm2d(3)
        whole = torch.randn(6, 4)
        self.columns, self.rows = nn.Parameter(whole.T), nn.Parameter(whole[2:4])
        self.still = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.register_buffer("view", torch.arange(12.0).reshape(4, 3).T)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + self.tied(x) + self.again(x)
        return y.sum() + self.nested[2](torch.ones(1, 3, 7)) + self.still.sum()


def saved(path: Path, module: nn.Module | None = None) -> dict[str, Tensor]:
    """Saves a module, and returns what torch loads."""
    torch.jit.save(torch.jit.script(Model() if module is None else module), path)
    return dict(torch.jit.load(path).state_dict())


def read(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a file that have values."""
    where = Checkpoint(path).where
    return {name: file.read(entry.name) for name, (file, entry) in where.items()}


@pytest.mark.parametrize("ending", [".jit", ".pt", ".ts", ".torchscript", ".bin", ".zzz", ""])
def test_tensors_equal_those_torch_loads(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    expected, found = saved(path), read(path)
    assert len(expected) > 30
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
    held = {"listed.0", "listed.1", "by_name.a", "perhaps", "plain", "box.held"}
    held = {f"nested.2.{name}" for name in held}
    assert found.keys() - expected.keys() == held | {f"lstm._flat_weights.{i}" for i in range(4)}


def test_roles_of_tensors(tmp_path: Path) -> None:
    """A parameter remains one if it is frozen, that is, requires no gradient."""
    model = Model()
    model.image.requires_grad_(False)
    torch.jit.save(torch.jit.script(model), tmp_path / "a.jit")
    program = torch.jit.load(tmp_path / "a.jit")
    parameters = dict(program.named_parameters(remove_duplicate=False))
    checkpoint = Checkpoint(tmp_path / "a.jit")
    left_out = {n: why for n, why in checkpoint.skipped().items() if why.reason is Reason.buffer}
    assert left_out == {
        **dict.fromkeys(
            ("view", "nested.2.basis", "nested.2.passing"), Skipped(Reason.buffer, "a buffer")
        ),
        **dict.fromkeys(
            (
                *(f"nested.2.{name}" for name in ("listed.0", "listed.1", "by_name.a")),
                *(f"nested.2.{name}" for name in ("perhaps", "plain", "box.held")),
            ),
            Skipped(Reason.buffer, "an attribute"),
        ),
    }
    measured = {one.name for one in checkpoint.matrices() if one.name not in left_out}
    same = (Reason.same, Reason.part)
    shared = {name for name, why in checkpoint.skipped().items() if why.reason in same}
    assert shared == {
        *("tied.weight", "again.weight", "rows"),
        *("lstm._flat_weights.0", "lstm._flat_weights.1"),
    }
    assert measured == {name for name, one in parameters.items() if one.ndim > 1} - shared
    unique = sum(one.numel() for one in program.parameters())
    # Tied biases count twice, as in any file; `rows` is a part of `columns`.
    assert sum(checkpoint.sizes.values()) == unique - parameters["rows"].numel() + 5


def test_audit_equals_audit_of_state_dict(tmp_path: Path) -> None:
    state = saved(tmp_path / "a.jit")
    known = {f.label: f for f in wc.audit(tmp_path / "a.jit").findings}
    for finding in wc.audit(state).findings:
        if finding.name in ("view", "nested.2.basis", "nested.2.passing"):
            assert finding.label not in known
            continue
        own = known.pop(finding.label)
        assert own.sigma_max == finding.sigma_max
        assert own.sigma_min == finding.sigma_min
    assert known == {}


def test_buffer_measured_by_exact_name(tmp_path: Path) -> None:
    saved(tmp_path / "a.jit")
    report = wc.audit(tmp_path / "a.jit", include="nested.2.basis")
    assert [finding.name for finding in report.findings] == ["nested.2.basis"]
    assert report.coverage.measured == 1


def test_infinite_mask_entries_are_not_reported(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    module.register_buffer("causal", torch.full((2, 3), -torch.inf))
    saved(tmp_path / "a.jit", module)
    assert wc.audit(tmp_path / "a.jit").not_finite == {}
    module.register_buffer("causal", torch.full((2, 3), torch.nan))
    saved(tmp_path / "a.jit", module)
    assert wc.audit(tmp_path / "a.jit").not_finite.keys() == {"causal"}


class Transform(nn.Module):
    """One row of a table of sines is zero."""

    def __init__(self) -> None:
        super().__init__()
        n, t = torch.arange(9.0)[:, None], torch.arange(32.0)
        angle = 2 * torch.pi * n * t / 32
        self.register_buffer("table", torch.cat([angle.cos(), angle.sin()])[:, None])
        self.layer = nn.Linear(18, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.conv1d(x, self.table, stride=16).mT)


def test_gate_ignores_fixed_transform(tmp_path: Path) -> None:
    state = saved(tmp_path / "a.jit", Transform())
    torch.save(state, tmp_path / "a.pt")
    limit = ["--max-condition", "100"]
    assert main(["audit", str(tmp_path / "a.jit"), *limit]) == 0
    assert main(["audit", str(tmp_path / "a.pt"), *limit]) == 1


@pytest.mark.parametrize("example", [(nn.Linear(4, 3), (1, 4)), (nn.Conv2d(2, 3, 2), (1, 2, 4, 4))])
def test_traced_module_is_read(tmp_path: Path, example: tuple[nn.Module, tuple[int, ...]]) -> None:
    module, shape = example
    torch.jit.save(torch.jit.trace(module, torch.ones(shape)), tmp_path / "a.jit")
    found = read(tmp_path / "a.jit")
    for name, tensor in module.state_dict().items():
        assert torch.equal(found.pop(name), tensor)
    assert found == {}


def test_mobile_program_is_read(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Conv2d(3, 3, 3))
    program = torch.jit.script(module)
    program._save_for_lite_interpreter(str(tmp_path / "a.ptl"))
    found = read(tmp_path / "a.ptl")
    assert found.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[name], tensor)


def test_conversion_of_flatbuffer_works(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 5))
    path, other = tmp_path / "a.ptl", tmp_path / "other.pt"
    torch.jit.script(module)._save_for_lite_interpreter(str(path), _use_flatbuffer=True)
    with pytest.raises(UnreadableError, match=r"as a flatbuffer. Save its weights") as error:
        wc.audit(path)
    exec(str(error.value).partition("Save its weights: ")[2][:-1], {**globals(), **locals()})
    assert [finding.name for finding in wc.audit(other).findings] == ["0.weight"]


# --- frozen programs ------------------------------------------------------------------------------


def frozen(path: Path, module: nn.Module) -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(module.eval())), path)


LOST = "a constant of a frozen program, which has lost its name and may not be a weight"


def test_frozen_weights_have_no_names(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    frozen(tmp_path / "a.jit", module)
    found = read(tmp_path / "a.jit")
    assert found.keys() == {f"CONSTANTS.c{number}" for number in range(4)}
    kept = sorted(tuple(t.flatten().tolist()) for t in module.state_dict().values())
    assert sorted(tuple(t.flatten().tolist()) for t in found.values()) == kept
    report = wc.audit(tmp_path / "a.jit")
    assert [finding.detail for finding in report.findings] == [LOST, LOST]
    wanted = [float(wc.condition_number(module[i].weight)) for i in (0, 2)]
    assert sorted(f.condition_number for f in report.findings) == pytest.approx(sorted(wanted))
    assert report.coverage.parameter_share == pytest.approx(35 / 43)
    torch.save(module.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must share the name of a weight"):
        wc.compare(tmp_path / "a.pt", tmp_path / "a.jit")


def test_frozen_kernel_known_only_by_shape(tmp_path: Path) -> None:
    frozen(tmp_path / "a.jit", nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    (finding,) = wc.audit(tmp_path / "a.jit").findings
    assert finding.label == "CONSTANTS.c0:kernel"
    assert finding.detail == f"{LOST}; a kernel only by its shape, which is a guess"


def test_constants_of_program_with_parameters_are_skipped(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.tensor([[1.0, 2.0, 3.0]] * 3)

    program = torch.jit.trace(Shifted(), torch.ones(3, 3))
    torch.jit.save(program, tmp_path / "a.jit")
    report = wc.audit(tmp_path / "a.jit")
    assert [finding.name for finding in report.findings] == ["layer.weight"]
    assert report.coverage.skipped["CONSTANTS.c0"] == Skipped(Reason.buffer, "a constant")


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_are_listed_with_reason(tmp_path: Path) -> None:
    if not {"fbgemm", "x86", "qnnpack"} & {*torch.backends.quantized.supported_engines}:
        pytest.skip("torch was built without quantised layers")
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0] = torch.ao.quantization.quantize_dynamic(module[:1], {nn.Linear})[0]
    torch.jit.save(torch.jit.script(module), tmp_path / "a.jit")
    report = wc.audit(tmp_path / "a.jit")
    assert [finding.name for finding in report.findings] == ["1.weight"]
    why = report.coverage.skipped["0._packed_params._packed_params.0"]
    assert why == Skipped(Reason.packed, "qint8")


def test_program_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "a.jit")
    with pytest.raises(NoTensorsError, match="must contain tensors, but is a program without any"):
        wc.audit(tmp_path / "a.jit")


# --- repair and folders ---------------------------------------------------------------------------


def test_repair_error_gives_working_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = tmp_path / "a.jit", tmp_path / "other.pt"
    saved(path, nn.Sequential(nn.Linear(4, 5)))
    command = ["repair", str(path), str(tmp_path / "b.jit"), "--max-condition", "2"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "wellcond does not write programs" in err
    exec(err.partition("Repair its weights: ")[2].rstrip(".\n"), {**globals(), **locals()})
    wc.repair(other, tmp_path / "b.pt", 2.0)
    assert wc.audit(tmp_path / "b.pt").findings[0].condition_number <= 2.0
    frozen(path, nn.Sequential(nn.Linear(4, 5)))
    with pytest.raises(ValueError, match="wellcond does not write frozen programs"):
        wc.repair(path, tmp_path / "b.jit", 2.0)


@pytest.mark.parametrize("name", ["program.pt", "program.jit", "program.bin"])
def test_program_next_to_weights_is_listed_under_any_name(tmp_path: Path, name: str) -> None:
    saved(tmp_path / name, nn.Linear(3, 3))
    assert [finding.name for finding in wc.audit(tmp_path).findings] == ["weight"]
    save_file({"w": torch.eye(3)}, tmp_path / "model.safetensors")
    report = wc.audit(tmp_path)
    assert [finding.name for finding in report.findings] == ["w"]
    why = Skipped(Reason.unread, "a TorchScript archive: give its path")
    assert report.coverage.skipped == {name: why}
    wc.repair(tmp_path, tmp_path.with_name(f"{tmp_path.name}-fixed"), 2.0)
    copied = tmp_path.with_name(f"{tmp_path.name}-fixed") / name
    assert filecmp.cmp(tmp_path / name, copied, shallow=False)


# --- hostile files --------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """Changes the records of a program."""
    saved(path, nn.Sequential(nn.Linear(3, 3)))
    contents = records(path.read_bytes())
    change(contents)
    path.write_bytes(zipped(contents))
    return path


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("record", ["a/data.pkl", "a/constants.pkl"])
def test_code_in_program_does_not_run(
    tmp_path: Path, code: bytes, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = changed(tmp_path / "a.jit", lambda contents: contents.update({record: code + b"."}))
    with pytest.raises(UnreadableError, match="is not a valid TorchScript archive: its "):
        Checkpoint(path)
    assert {one.name for one in tmp_path.iterdir()} == {"a.jit"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.update({"a/data/0": bytes(32)}), "36 bytes for storage 0, but contains 32"),
        (lambda r: r.update({"a/DATA.PKL": b"\x80\x02)."}), "two of its records have the same"),
        (lambda r: r.update({"b/other": b""}), "its records are in several folders"),
        (lambda r: r.update({"a/byteorder": b"middle"}), "byteorder must be"),
        (lambda r: r.update({"a/constants.pkl": b"\x80\x02N."}), "its constants are not a tuple"),
        (lambda r: r.update({"a/data.pkl": b"\x80\x02)."}), "its pickle contains no module"),
        (lambda r: r.update({"a/data.pkl": b"\x80\x02"}), "no complete pickle"),
        (lambda r: r.pop("a/data.pkl"), "without constants|no complete pickle|is a zip archive"),
    ],
)
def test_contradictory_programs_are_refused(
    tmp_path: Path, change: Callable[[dict[str, bytes]], object], match: str
) -> None:
    path = changed(tmp_path / "a.jit", change)
    with pytest.raises(UnreadableError, match=match):
        Checkpoint(path)


def test_storage_beyond_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jit"
    saved(path, nn.Linear(64, 64))
    data = path.read_bytes()
    for keep in (100, 5000, len(data) - 10):
        path.write_bytes(data[:keep])
        with pytest.raises(UnreadableError, match="damaged"):
            Checkpoint(path)


def nested(depth: int) -> bytes:
    """A pickle of modules, each of which contains the previous one twice."""
    module = b"c__torch__\nM\n)\x81}"
    made = module + b"b"
    for level in range(depth):
        put = pickle.LONG_BINPUT + level.to_bytes(4, "little")
        get = pickle.LONG_BINGET + level.to_bytes(4, "little")
        made += put + b"0" + module + b"(U\x01a" + get + b"U\x01b" + get + b"ub"
    return b"\x80\x02" + made + b"."


@pytest.mark.parametrize("depth", [40, 3000])
def test_too_many_modules_are_refused(tmp_path: Path, depth: int) -> None:
    path = changed(tmp_path / "a.jit", lambda r: r.update({"a/data.pkl": nested(depth)}))
    with pytest.raises(UnreadableError, match="must contain at most 200,000 dicts"):
        Checkpoint(path)


def test_class_without_source_text_may_have_parameters(tmp_path: Path) -> None:
    def strip(contents: dict[str, bytes]) -> None:
        for name in [name for name in contents if "/code/" in name]:
            del contents[name]

    path = changed(tmp_path / "a.jit", strip)
    assert [finding.name for finding in wc.audit(path).findings] == ["0.weight"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_file_changed_while_read_is_refused(tmp_path: Path, compression: int) -> None:
    path = tmp_path / "a.jit"
    state = saved(path, nn.Linear(6, 6))
    path.write_bytes(zipped(records(path.read_bytes()), compression))
    checkpoint = Checkpoint(path)
    (weight,) = checkpoint.matrices()
    assert torch.equal(weight.read(), state["weight"])
    shutil.copy(path, tmp_path / "b")
    os.utime(tmp_path / "b", ns=(0, 0))
    (tmp_path / "b").rename(path)
    with pytest.raises(UnreadableError, match="has changed while it was read"):
        weight.read()
