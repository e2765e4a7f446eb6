"""The schemas of docs/schemas accept the output of the commands, and nothing else."""

import copy
import dataclasses
import functools
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator as Validator
from referencing import Registry, Resource
from safetensors.torch import save_file

import wellcond as wc
from wellcond.audits.baseline import BaselineComparison, Rise
from wellcond.cli import main
from wellcond_experiments.grid import Cell, Chosen

ROOT = Path(__file__).parents[1]
SCHEMAS = {path.stem: path for path in sorted((ROOT / "docs" / "schemas").glob("*.json"))}
# Objects whose keys are names from an experiment.
NAMED = {"metrics", "curves"}
Printed = Callable[..., Any]


@functools.cache
def schema(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(SCHEMAS[name].read_text())
    return loaded


def faults(name: str, document: Any) -> list[str]:
    beside = Registry(
        retrieve=lambda uri: Resource.from_contents(schema(uri.removesuffix(".json")))
    )
    errors = Validator(schema(name), registry=beside).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """The output of a command, read as strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    def run(*argv: object) -> Any:
        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) in (0, 1, 2)
        return json.loads(capsys.readouterr().out, parse_constant=refuse)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file with every status of a weight, attention, a stack, and skipped tensors."""
    weights = {
        "attn.q_proj.weight": normal(8, 8),
        "attn.k_proj.weight": normal(8, 8) + 1,
        "attn.v_proj.weight": normal(8, 8) - 1,
        "attn.o_proj.weight": normal(8, 8) * 2,
        "experts": normal(2, 4, 3).half(),
        "flat": torch.ones(3, 3),
        "nothing": torch.zeros(3, 3),
        "lost": torch.full((3, 3), math.nan),
        "bias": torch.ones(3),
        "codes": torch.ones(3, 3, dtype=torch.int8),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no header")
    (folder / "config.json").write_text('{"num_attention_heads": 2, "hidden_size": 8}')
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path]:
    """A trained LoRA adapter, a fresh one, and their base."""
    folder, base = tmp_path / "adapter", tmp_path / "base.safetensors"
    folder.mkdir()
    tensors = {}
    for layer in (0, 1):
        module = f"base_model.model.layers.{layer}.q_proj"
        tensors[f"{module}.lora_A.weight"] = normal(3, 10)
        tensors[f"{module}.lora_B.weight"] = normal(7, 3) * layer
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"layers.{i}.q_proj.weight": normal(7, 10) + i for i in (0, 1)}, base)
    return folder, base


def statuses(document: dict[str, Any]) -> set[str]:
    return {finding["status"] for finding in document["findings"]}


# --- the schemas themselves -----------------------------------------------------------------------


def test_every_documented_output_has_a_schema() -> None:
    page = (ROOT / "docs" / "reference" / "json.md").read_text()
    assert set(re.findall(r"\]\(\.\./schemas/(\w+)\.json\)", page)) == set(SCHEMAS)
    assert set(re.findall(r"```\{schema-fields\} (\w+)", page)) == set(SCHEMAS)


def objects(part: Any) -> Iterator[dict[str, Any]]:
    """All parts of a schema that describe an object."""
    if isinstance(part, dict):
        if part.get("type") == "object":
            yield part
        part = list(part.values())
    for inner in part if isinstance(part, list) else ():
        yield from objects(inner)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_strict_and_describe_each_field(name: str) -> None:
    Validator.check_schema(schema(name))
    for one in objects(schema(name)):
        fields = one.get("properties", {})
        assert set(one.get("required", ())) <= set(fields)
        if "data" not in fields:  # settings of an experiment, which adds its own
            assert one["additionalProperties"] is False or not fields
        assert all(field.get("description") for field in fields.values())


def test_shared_definitions_are_equal() -> None:
    """Each schema except audits.json is complete, so a program needs only one file."""
    shared: dict[str, Any] = {}
    for name in SCHEMAS:
        for key, part in schema(name).get("$defs", {}).items():
            assert shared.setdefault(key, part) == part


# --- the fields match the classes, which describe them --------------------------------------------


def attributes(kind: type) -> set[str]:
    """The fields in the docstring of a class, and its properties that have a docstring."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    named = set(re.findall(r"^    (\w+): ", section, flags=re.MULTILINE))
    computed = property | functools.cached_property
    return named | {n for n, one in vars(kind).items() if isinstance(one, computed) and one.__doc__}


def of(name: str, *path: str) -> set[str]:
    part = schema(name)
    for key in path:
        part = part[key]
    return set(part["properties"])


FINDING = ("$defs", "finding")
CERTIFICATE = (*FINDING, "properties", "certificate")
REPAIR = ("properties", "repairs", "items")
RUN, CHOSEN = ("properties", "runs", "items"), ("properties", "chosen", "items")
BASELINE = ("properties", "baseline")


@pytest.mark.parametrize(
    ("fields", "kind", "others"),
    [
        # All singular values would make a document large. entries and inner follow from shapes.
        # The other fields are only for sentences.
        (
            of("audit", *FINDING),
            wc.report.Finding,
            {
                "singular_values",
                "entries",
                "inner",
                "gap",
                "opposite_rows",
                "repair_limit",
                "repair_change",
            },
        ),
        (of("audit", *CERTIFICATE), wc.Certificate, {"computed"}),
        (of("audit", "properties", "coverage"), wc.report.Coverage, set()),
        (of("audit", *BASELINE), BaselineComparison, set()),
        (of("audit", *BASELINE, "properties", "risen", "items"), Rise, set()),
        (of("repair", *REPAIR), wc.report.Repair, set()),
        (of("results", *CHOSEN), Chosen, set()),
        (of("results", *RUN) - {"metrics", "curves", "seconds", "cpu_seconds"}, Cell, set()),
    ],
)
def test_fields_match_the_class(fields: set[str], kind: type, others: set[str]) -> None:
    of_the_class = {field.name for field in dataclasses.fields(kind)}
    assert of_the_class - fields == others
    if hasattr(wc, kind.__name__):  # public classes describe each field
        assert fields <= attributes(kind)
    else:
        assert fields <= of_the_class


@pytest.mark.parametrize("kind", [wc.report.Grade, wc.report.Status])
def test_values_match_the_enumeration(
    kind: type[wc.report.Grade] | type[wc.report.Status],
) -> None:
    field = schema("audit")["$defs"]["finding"]["properties"][kind.__name__.lower()]
    assert field["enum"] == [one.name for one in kind]


# --- printed documents are valid ------------------------------------------------------------------


def test_audits_of_every_kind_are_valid(
    printed: Printed, model: Path, adapter: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = printed("audit", model)
    seen = statuses(plain)
    assert faults("audit", plain) == []
    certified = printed("audit", model, "--certify", "--heads", "--max-condition", "100")
    assert faults("audit", certified) == []
    assert any("certificate" in finding for finding in certified["findings"])
    assert any(finding["view"].startswith("qk") for finding in certified["findings"])
    assert certified["exceeding"]
    assert faults("audit", printed("audit", model, "--max-condition", "inf")) == []

    folder, base = adapter
    for options in ([], ["--base", base], ["--base", base, "--exclude", "*:merged"]):
        document = printed("audit", folder, *options)
        assert faults("audit", document) == []
        seen |= statuses(document)
        views = {finding["view"] for finding in document["findings"]}
        assert views == {0: {"delta"}, 2: {"merged"}, 4: {"delta", ""}}[len(options)]
    assert seen == {status.name for status in wc.report.Status}

    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(plain))
    save_file({"flat": torch.eye(3), "new": torch.eye(2)}, tmp_path / "new.safetensors")
    save_file({"flat": torch.ones(3, 3)}, tmp_path / "worse.safetensors")
    for path, options in (("new", []), ("worse", ["--max-rise", "inf"])):
        document = printed(
            "audit", tmp_path / f"{path}.safetensors", "--baseline", baseline, *options
        )
        assert faults("audit", document) == []
        baseline.write_text(json.dumps(document))
    assert [rise["label"] for rise in document["baseline"]["risen"]] in ([], ["flat"])


def test_audits_of_several_checkpoints_are_valid(
    printed: Printed, model: Path, tmp_path: Path
) -> None:
    save_file({"w": torch.eye(2)}, tmp_path / "fine.safetensors")
    paths = (model, tmp_path / "missing.pt", tmp_path / "fine.safetensors")
    document = printed("audit", *paths, "--max-condition", "3")
    assert faults("audits", document) == []
    assert [len(document[key]) for key in ("reports", "not_audited")] == [2, 1]
    document["reports"][1]["findings"][0]["rank"] = "two"
    assert faults("audits", document) == [
        "$.reports[1].findings[0].rank: 'two' is not of type 'integer'"
    ]


def test_audit_of_a_model_is_valid() -> None:
    """Kernels of several groups have three dimensions; convolution operators can be bounded."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 6, 3, groups=3))
    for example in (None, torch.zeros(1, 4, 8, 8)):
        report = wc.audit(model, example=example)
        assert faults("audit", json.loads(report.to_json())) == []
    large = [
        dataclasses.replace(one, grade=wc.report.Grade.bounded, rank=0) for one in report.findings
    ]
    document = dataclasses.replace(report, findings=large).to_json(max_condition=3)
    assert faults("audit", json.loads(document)) == []


def test_comparisons_are_valid_with_missing_weights(printed: Printed, tmp_path: Path) -> None:
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    torch.save({"a": normal(4, 4), "flat": torch.ones(2, 2), "old": torch.eye(2)}, before)
    torch.save({"a": normal(4, 4).half(), "flat": torch.eye(2), "new": torch.zeros(2, 2)}, after)
    for options in ([], ["--max-condition", "5"], ["--certify"]):
        document = printed("audit", before, "--compare", after, *options)
        assert faults("comparison", document) == []
        sides = {(row["before"] is None, row["after"] is None) for row in document["comparison"]}
        assert sides == {(False, False), (True, False), (False, True)}
    missing = copy.deepcopy(document)
    row = next(row for row in missing["comparison"] if row["before"] is None)
    assert row["ratio"] is None
    row["ratio"] = 1.0
    assert faults("comparison", missing)
    row |= {"ratio": None, "after": None}
    assert faults("comparison", missing)


def test_repairs_are_valid(printed: Printed, tmp_path: Path) -> None:
    weights = {
        "flat": torch.ones(3, 3),
        "zero": torch.zeros(2, 3),
        "half": (torch.diag(torch.tensor([100.0, 1.0, 1.0]))).half(),
        "conv.weight": normal(4, 2, 3, 3),
        "bias": torch.ones(3),
    }
    save_file(weights, tmp_path / "in.safetensors")
    for limit in ("10", "inf"):
        out = tmp_path / f"{limit}.safetensors"
        document = printed("repair", tmp_path / "in.safetensors", out, "--max-condition", limit)
        assert faults("repair", document) == []
        assert {row["before"] for row in document["repairs"]} >= {"nan", "inf"}


@pytest.mark.slow
def test_results_are_valid(printed: Printed, tmp_path: Path) -> None:
    options = ("--quick", "--seeds", "1", "--workers", "1", "--out", tmp_path / "out")
    document = printed("reproduce", "differentiability", *options)
    assert faults("results", document) == []
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == document


# The other files come from scripts, not from `wellcond reproduce`.
OTHERS = {"adapters", "cohort", "cohort-check"}
RESULTS = [p for p in (ROOT / "results").glob("*.json") if p.stem not in OTHERS]


@pytest.mark.parametrize("path", sorted(RESULTS), ids=lambda p: p.stem)
def test_committed_results_are_valid(path: Path) -> None:
    document = json.loads(path.read_text())
    runs = document["runs"]
    some = document | {
        "runs": runs[:: len(runs) // 40 + 1]
    }  # validating all runs would take minutes
    assert faults("results", some) == []


# --- other documents are invalid ------------------------------------------------------------------


MISSING = object()


def put(document: Any, path: Sequence[str | int], value: Any) -> Any:
    """A copy with another value at this path, or without the value."""
    *above, key = path
    copied = copy.deepcopy(document)
    part = functools.reduce(lambda inner, key: inner[key], above, copied)
    if value is MISSING:
        del part[key]
    else:
        part[key] = value
    return copied


def wrong_values(part: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Paths and wrong values for them; for a list, only in its first row."""
    if path:
        yield path, {"surprise": {}}
    if isinstance(part, dict):
        named = bool(path) and path[-1] in NAMED
        if not named and path != ("settings",):
            yield (*path, "surprise"), 1
        for key, value in [*part.items()][: 1 if named else None]:
            if path == ("settings",) and key not in ("experiment", "data", "quick"):
                continue
            if not named and key not in ("certificate", "code"):  # these can be missing
                yield (*path, key), MISSING
            yield from wrong_values(value, (*path, key))
    elif isinstance(part, list) and part:
        yield from wrong_values(part[0], (*path, 0))
    elif isinstance(part, float) or part in ("inf", "nan"):
        yield from ((path, wrong) for wrong in ("Infinity", "NaN", "1", True, None))
    elif isinstance(part, str | int):
        yield path, None


def test_document_with_one_change_is_refused(printed: Printed, tmp_path: Path) -> None:
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    save_file({"a": normal(3, 3)}, before)
    save_file({"a": torch.diag(torch.tensor([1e5, 1.0, 1.0]))}, after)
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(printed("audit", before)))
    options = ("--certify", "--max-condition", "3", "--baseline", baseline)
    results = json.loads((ROOT / "results" / "cost.json").read_text())
    documents = {
        "audit": printed("audit", after, *options),
        "audits": printed("audit", after, tmp_path / "missing.pt"),
        "comparison": printed("audit", before, "--compare", after, "--max-condition", "3"),
        "repair": printed("repair", after, tmp_path / "out.safetensors", "--max-condition", "3"),
        "results": results | {"runs": results["runs"][:1]},
    }
    assert set(documents) == set(SCHEMAS)
    impossible = [
        ("audit", ("coverage", "parameter_share"), 1.5),
        ("audit", ("findings", 0, "exceedance"), 2.0),
        ("audit", ("findings", 0, "condition_number"), -1.0),
        ("audit", ("findings", 0, "certificate", "sigma_max"), [1.0]),
        ("comparison", ("max_condition",), 0.5),
        ("repair", ("repairs", 0, "margin"), -1.0),
        ("results", ("seeds",), 0),
    ]
    for name, path, value in impossible:
        assert faults(name, put(documents[name], path, value)), (name, path, value)
    for name, document in documents.items():
        assert faults(name, document) == []
        count = 0
        for path, value in wrong_values(document):
            count += 1
            assert faults(name, put(document, path, value)), (name, path, value)
        assert count > 50
