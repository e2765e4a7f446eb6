"""torch.export programs: tensors equal those of torch.export.load, and their roles are known."""

import io
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import CODES, DESCRIBES_WEIGHTS, older, records, zipped
from safetensors.torch import save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.cli import main
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import NoTensorsError, UnreadableError
from wellcond.weights.reasons import Reason, Skipped

LAYOUTS = ["new", "older", "oldest"]
pytestmark = pytest.mark.skipif(not DESCRIBES_WEIGHTS, reason="torch writes an older layout")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch logs that a format is older."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Model(nn.Module):
    """Parameters of several dtypes, some with shared memory, buffers and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.tied = nn.Linear(4, 5), nn.Linear(4, 5, bias=False)
        self.tied.weight = self.linear.weight
        self.conv = nn.Conv1d(3, 4, 2)
        self.brain, self.short = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).half()
        whole = torch.randn(6, 5)
        self.upper, self.lower = nn.Parameter(whole[:3]), nn.Parameter(whole[3:].T)
        self.still = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("basis", torch.randn(5, 6))
        self.register_buffer("passing", torch.randn(5, 6), persistent=False)
        self.register_buffer("steps", torch.arange(6).reshape(2, 3))
        self.plain = torch.randn(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x) + self.tied(x)) + torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
        y = y.sum() + self.basis.sum() + self.passing.sum() + self.plain.sum() + self.steps.sum()
        y = y + self.upper.sum() + self.lower.sum() + self.still.sum() + self.brain.weight.sum()
        return y + self.conv(x.reshape(1, 3, 4)).sum() + self.short.weight.sum()


@pytest.fixture(scope="module")
def program() -> bytes:
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Model().eval(), (torch.randn(3, 4),)), file)
    return file.getvalue()


def write(path: Path, program: bytes, layout: str = "new") -> Path:
    path.write_bytes(program if layout == "new" else older(program, flat=layout == "oldest"))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", [".pt2", ".pt", ""])
def test_tensors_equal_those_torch_loads(
    tmp_path: Path, program: bytes, layout: str, ending: str
) -> None:
    path = write(tmp_path / f"a{ending}", program, layout)
    expected = dict(torch.export.load(io.BytesIO(path.read_bytes())).state_dict)
    where = Checkpoint(path).where
    found = {name: file.read(entry.name) for name, (file, entry) in where.items()}
    assert len(expected) > 15
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0)
    constants = {"passing", "plain", "lifted_tensor_0"} if layout == "new" else set()
    assert found.keys() - expected.keys() == constants


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.multiplied = nn.Conv2d(6, 12, 3, groups=6, bias=False)
        self.grouped = nn.Conv2d(6, 4, 3, groups=2, padding="same")
        self.plain = nn.Conv2d(6, 4, 3)
        self.transposed = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.line = nn.Conv1d(4, 6, 3, groups=2)
        self.volume = nn.Conv3d(2, 4, 2, groups=2)
        self.loose = nn.Parameter(torch.randn(6, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).sum() + self.multiplied(x).sum() + self.grouped(x).sum()
        y = y + self.plain(x).sum() + self.transposed(x).sum() + self.line(x[:, :4, 0]).sum()
        y = y + self.volume(x[:, :2, None].expand(1, 2, 3, 5, 5)).sum()
        one = nn.functional.conv2d(x[:, :3], self.loose)  # the same kernel with other groups
        return y + one.sum() + nn.functional.conv2d(x, self.loose, groups=2).sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decomposed", [False, True])
def test_kernels_measured_in_groups_like_model(
    tmp_path: Path, layout: str, decomposed: bool
) -> None:
    """Only a kernel that is used with two numbers of groups remains one group."""
    model = Convolutions()
    exported = torch.export.export(model, (torch.randn(1, 6, 5, 5),))
    torch.export.save(exported.run_decompositions() if decomposed else exported, tmp_path / "a.pt2")
    report = wc.audit(write(tmp_path / "a.pt2", (tmp_path / "a.pt2").read_bytes(), layout))
    expected = {one.label: one for one in wc.audit(model).findings}
    found = {one.label: one for one in report.findings if one.name != "loose"}
    assert found.keys() == expected.keys()
    for label, one in found.items():
        assert one.shape == expected[label].shape
        assert one.condition_number == expected[label].condition_number
        assert one.explanation == expected[label].explanation
    assert report.coverage.note.startswith("1 kernel is read as one group")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roles_of_tensors(tmp_path: Path, program: bytes, layout: str) -> None:
    path = write(tmp_path / "a.pt2", program, layout)
    state = torch.export.load(io.BytesIO(path.read_bytes())).state_dict
    parameters = {name for name, one in state.items() if isinstance(one, nn.Parameter)}
    skipped = Checkpoint(path).skipped()
    constants = {"passing", "plain", "lifted_tensor_0"} if layout == "new" else set()
    assert {n: w for n, w in skipped.items() if w.reason is Reason.buffer} == {
        "basis": Skipped(Reason.buffer, "a buffer"),
        **dict.fromkeys(constants, Skipped(Reason.buffer, "a constant")),
    }
    assert skipped["tied.weight"] == Skipped(Reason.same, "linear.weight")
    report = wc.audit(path)
    measured = {finding.name for finding in report.findings}
    assert measured == {n for n in parameters if state[n].ndim > 1} - {"tied.weight"}
    counted = sum(state[name].numel() for name in parameters - {"tied.weight"})
    assert sum(Checkpoint(path).sizes.values()) == counted
    assert wc.audit(path, include="basis").findings[0].name == "basis"


def test_audit_equals_audit_of_state_dict(tmp_path: Path, program: bytes) -> None:
    path = write(tmp_path / "a.pt2", program)
    known = {f.label: f for f in wc.audit(path).findings}
    state = torch.export.load(io.BytesIO(program)).state_dict
    assert len(known) >= 7
    for finding in wc.audit({name: one.detach() for name, one in state.items()}).findings:
        if finding.name != "basis":
            own = known.pop(finding.label)
            assert (own.sigma_max, own.sigma_min) == (finding.sigma_max, finding.sigma_min)
    assert known == {}


def test_several_programs_in_archive_are_distinguished(tmp_path: Path) -> None:
    package = pytest.importorskip("torch.export.pt2_archive._package")
    programs = {
        name: torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)) for name in ("one", "Two")
    }
    package.package_pt2(str(tmp_path / "a.pt2"), exported_programs=programs)
    where = Checkpoint(tmp_path / "a.pt2").where
    assert where.keys() == {f"{n}.{part}" for n in programs for part in ("weight", "bias")}
    for name, program in programs.items():
        for part, tensor in program.state_dict.items():
            file, entry = where[f"{name}.{part}"]
            assert torch.equal(file.read(entry.name), tensor)


def test_program_without_parameters_classified_by_names(tmp_path: Path) -> None:
    """For example, the weights of a quantised program are buffers."""
    module = nn.Module()
    module.register_buffer("weight", torch.eye(3))
    module.forward = lambda x: x @ module.weight
    torch.export.save(torch.export.export(module, (torch.ones(1, 3),)), tmp_path / "a.pt2")
    assert [finding.name for finding in wc.audit(tmp_path / "a.pt2").findings] == ["weight"]


def test_program_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(1),)), tmp_path / "a.pt2")
    with pytest.raises(NoTensorsError, match="must contain tensors, but is a program without any"):
        wc.audit(tmp_path / "a.pt2")


def test_compiled_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        for name in ("archive_format", "data/aotinductor/model/code.so"):
            archive.writestr(f"a/{name}", "pt2")
    with pytest.raises(UnreadableError, match="The code of a compiled program contains them"):
        wc.audit(tmp_path / "a.pt2")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repair_error_gives_working_conversion(
    tmp_path: Path, program: bytes, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = write(tmp_path / "a.pt2", program, layout), tmp_path / "other.pt"
    command = ["repair", str(path), str(tmp_path / "b.pt2"), "--max-condition", "2"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "wellcond does not write programs" in err
    path.rename(path := tmp_path / "b.pt2")
    exec(err.partition("Repair its weights: ")[2].rstrip(".\n"), {"torch": torch} | locals())
    names = {finding.name for finding in wc.audit(other).findings}
    assert {"linear.weight", "still", "upper"} <= names


def test_program_next_to_weights_is_listed(tmp_path: Path, program: bytes) -> None:
    write(tmp_path / "a.pt2", program)
    assert wc.audit(tmp_path).coverage.measured > 0
    save_file({"w": torch.eye(3)}, tmp_path / "model.safetensors")
    report = wc.audit(tmp_path)
    assert [finding.name for finding in report.findings] == ["w"]
    assert report.coverage.skipped == {
        "a.pt2": Skipped(Reason.unread, "a torch.export program: give its path")
    }


# --- hostile files --------------------------------------------------------------------------------

CONFIG = "data/weights/model_weights_config.json"


def changed(
    path: Path, program: bytes, change: Callable[[dict[str, Any], dict[str, bytes]], object]
) -> Path:
    """Changes the JSON of a program, or its records without their folder."""
    contents = {name.partition("/")[2]: data for name, data in records(program).items()}
    description = json.loads(contents[CONFIG])
    change(description["config"], contents)
    if CONFIG in contents:
        contents[CONFIG] = contents[CONFIG][:0] + json.dumps(description).encode()
    path.write_bytes(zipped({f"a/{name}": data for name, data in contents.items()}))
    return path


def meta(**new: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    """Returns a change of the description of one weight."""
    return lambda config, _: config["linear.weight"]["tensor_meta"].update(new)


def of(*sides: int) -> list[dict[str, int]]:
    return [{"as_int": side} for side in sides]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (meta(sizes=of(5, 400)), "a tensor extends beyond its storage"),
        (meta(strides=of(400, 1)), "a tensor extends beyond its storage"),
        (meta(storage_offset={"as_int": 1}), "a tensor extends beyond its storage"),
        (meta(storage_offset={"as_int": -1}), "must be non-negative integers"),
        (meta(sizes=of(5)), "must have a shape and strides"),
        (meta(sizes=of(1 << 62, 1 << 62)), "must have a shape and a dtype"),
        (meta(sizes=of(-5, 4)), "must have a shape and a dtype"),
        (meta(dtype=99), "must have a shape and a dtype"),
        (meta(dtype=[]), "does not describe weights like this"),
        (meta(dtype=8), "a tensor extends beyond its storage"),
        (meta(sizes=[{"as_expr": "s0"}] * 2), "does not describe weights like this"),
        (lambda config, _: config["linear.weight"].update(path_name="../x"), "it lacks data/w"),
        (lambda config, _: config.update({"basis": None}), "does not describe weights like this"),
        (
            lambda config, _: config.update({"linear.weight": 3}),
            "does not describe weights like this",
        ),
        (lambda _, r: r.update({"data/weights/weight_0": b"123"}), "length of a storage|beyond"),
        (lambda _, r: r.update({"DATA/weights/weight_0": b""}), "two of its records have the"),
        (lambda _, r: r.update({"byteorder": b"?"}), "byteorder must be"),
        (lambda _, r: r.pop(CONFIG), "contains none there|without any"),
    ],
)
def test_contradictory_programs_are_refused(
    tmp_path: Path,
    program: bytes,
    change: Callable[[dict[str, Any], dict[str, bytes]], object],
    match: str,
) -> None:
    path = changed(tmp_path / "a.pt2", program, change)
    with pytest.raises(UnreadableError, match=match):
        Checkpoint(path)


@pytest.mark.parametrize(
    "argument", [{"as_int": 0}, {"as_int": 3}, {"as_int": True}, {"as_sym_int": {}}, None, 2]
)
def test_invalid_groups_are_unknown(tmp_path: Path, program: bytes, argument: Any) -> None:
    def regroup(config: dict[str, Any], contents: dict[str, bytes]) -> None:
        model = json.loads(contents["models/model.json"])
        nodes = model["graph_module"]["graph"]["nodes"]
        (node,) = (one for one in nodes if "conv1d" in one["target"])
        node["inputs"] = [one for one in node["inputs"] if one["name"] != "groups"]
        node["inputs"].append({"name": "groups", "arg": argument, "kind": 1})
        contents["models/model.json"] = json.dumps(model).encode()

    report = wc.audit(changed(tmp_path / "a.pt2", program, regroup))
    assert report.coverage.note.startswith("1 kernel is read as one group")


def test_tensors_without_values_are_listed_with_reason(tmp_path: Path, program: bytes) -> None:
    """A program exported from fake tensors contains no values."""

    def empty(config: dict[str, Any], contents: dict[str, bytes]) -> None:
        contents[f"data/weights/{config['linear.weight']['path_name']}"] = b""

    skipped = Checkpoint(changed(tmp_path / "a.pt2", program, empty)).skipped()
    assert skipped["linear.weight"] == Skipped(Reason.no_values)


def test_tensors_of_foreign_classes_are_listed(tmp_path: Path, program: bytes) -> None:
    def pickled(config: dict[str, Any], contents: dict[str, bytes]) -> None:
        config["linear.weight"]["use_pickle"] = True

    skipped = Checkpoint(changed(tmp_path / "a.pt2", program, pickled)).skipped()
    assert skipped["linear.weight"].reason is Reason.tensor_class


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("flat", [False, True])
def test_code_in_program_does_not_run(
    tmp_path: Path, program: bytes, code: bytes, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for every pickle in the program; example inputs are not read."""
    monkeypatch.chdir(tmp_path)
    contents = records(older(program, flat))
    (state,) = [name for name in contents if re.search(r"weights/model.pt|state_dict.pt", name)]
    inner = records(contents[state])
    inner = {n: code + b"." if n.endswith("data.pkl") else data for n, data in inner.items()}
    contents[state] = zipped(inner)
    (tmp_path / "a.pt2").write_bytes(zipped(contents))
    with pytest.raises(UnreadableError):
        wc.audit(tmp_path / "a.pt2")
    assert {one.name for one in tmp_path.iterdir()} == {"a.pt2"}


@pytest.mark.parametrize("flat", [False, True])
def test_error_for_compressed_state_dict_gives_remedy(
    tmp_path: Path, program: bytes, flat: bool
) -> None:
    contents = records(older(program, flat))
    (tmp_path / "a.pt2").write_bytes(zipped(contents, zipfile.ZIP_DEFLATED))
    with pytest.raises(UnreadableError, match="compressed") as error:
        Checkpoint(tmp_path / "a.pt2")
    assert "torch.export.load(path).state_dict" in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_file_is_refused(
    tmp_path: Path, program: bytes, layout: str, keep: float
) -> None:
    path = write(tmp_path / "a.pt2", program, layout)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UnreadableError, match="damaged"):
        Checkpoint(path)


def test_archive_without_format_is_not_a_program(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/data/weights/w", "12345678")
    with pytest.raises(UnreadableError, match="is a zip archive without archive_format"):
        Checkpoint(tmp_path / "a.pt2")
