"""Time and memory of an audit of a large generated checkpoint, quantised and in bfloat16.

The checkpoint has the shapes of a language model of 8 billion parameters: width 4096, 32 heads, 8
heads of keys and values, 14336 hidden units, 128256 tokens. Its matrices are float8 with one scale
per 128x128 block, the format of DeepSeek V3. Embedding and head are bfloat16. The same layers are
also audited in bfloat16.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from wellcond_experiments.benchmark import Benchmark, count, option
from wellcond_experiments.command import Advance

WIDTH, UNITS, KEYS, WORDS, BLOCK = 4096, 14336, 1024, 128256, 128
MATRICES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (UNITS, WIDTH),
    "mlp.up_proj": (UNITS, WIDTH),
    "mlp.down_proj": (WIDTH, UNITS),
}
_CODES = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class File(Benchmark):
    name = "file"
    help = "time and memory of an audit of a large quantised checkpoint"
    description = (
        "Writes checkpoints with the shapes of a model of 8 billion parameters, in FP8 and in "
        "bfloat16, and audits some of their layers in a separate process. Reports the time and "
        "the peak memory, also relative to the largest measured weight in float32."
    )
    example = "--layers 16 --measured 8"
    columns: ClassVar = {
        "format": ("format", ""),
        "gigabytes": ("GB", ".2f"),
        "matrices": ("matrices", "d"),
        "seconds": ("seconds", ".0f"),
        "peak_bytes": ("peak, bytes", ","),
        "peak": ("peak / largest weight in float32", ".2f"),
        "above_import": ("peak without imports", ".2f"),
    }

    layers: int = count(16, "written layers")
    measured: int = count(8, "measured layers")
    formats: str = option("FP8,bfloat16", "one format, or both")
    shrink: int = count(1, "divides all sizes, for a quick test")
    folder: str = option(None, "folder for about 10 GB; a temporary folder by default")

    @property
    def total(self) -> int:
        return len(self.formats.split(","))

    def measure(self, advance: Advance) -> dict[str, Any]:
        runs = []
        largest = 4 * WIDTH * UNITS // self.shrink**2
        start = audit_peak(None, 0)["peak_bytes"]
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            for name in self.formats.split(","):
                folder = Path(made, name)
                write_checkpoint(folder, name == "FP8", self.layers, self.shrink)
                run = audit_peak(folder, min(self.measured, self.layers))
                size = sum(path.stat().st_size for path in folder.iterdir())
                peak = run["peak_bytes"]
                runs.append(
                    {"format": name, "gigabytes": size / 1e9}
                    | run
                    | {"peak": peak / largest, "above_import": (peak - start) / largest}
                )
                for path in folder.iterdir():
                    path.unlink()
                advance(name)
        settings = {"layers": self.layers, "measured": self.measured}
        settings |= {"threads": torch.get_num_threads(), "import_bytes": start}
        return {"settings": settings, "runs": runs}

    def title(self, document: dict[str, Any]) -> str:
        return (
            f"Audit of {self.measured} of {self.layers} layers with the shapes of an 8B model, "
            f"{document['settings']['threads']} threads"
        )


def audit_peak(folder: Path | None, layers: int) -> dict[str, Any]:
    """Audits in a separate process; returns its rows, seconds and peak resident bytes.

    Without a folder, the process measures one small matrix.
    """
    program = (
        "import json, sys, time, torch, wellcond as wc\n"
        "from wellcond_experiments.bench_file import peak_bytes\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "start = time.perf_counter()\n"
        "names = [f'model.layers.{i}.*' for i in range(int(sys.argv[3]))]\n"
        "source = sys.argv[2] or torch.nn.Linear(9, 9)\n"
        "found = len(wc.audit(source, include=names).findings)\n"
        "print(json.dumps([found, time.perf_counter() - start, peak_bytes()]))\n"
    )
    threads = str(torch.get_num_threads())
    arguments = [threads, str(folder or ""), str(layers)]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": threads}
    line = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout
    matrices, seconds, peak = json.loads(line)
    return {"matrices": matrices, "seconds": seconds, "peak_bytes": peak}


def peak_bytes() -> int:
    """Returns the peak resident bytes of this process.

    On Linux it reads VmHWM, because ru_maxrss includes the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def write_checkpoint(folder: Path, quantised: bool, layers: int, shrink: int) -> None:
    """Writes a shard per layer, one for embedding and head, an index, and config.json."""
    folder.mkdir()
    source = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}

    def write(shard: str, tensors: Iterator[tuple[str, Tensor]]) -> None:
        places.update(dict.fromkeys(write_shard(folder / shard, tensors), shard))

    def matrices(prefix: str) -> Iterator[tuple[str, Tensor]]:
        for name, sides in MATRICES.items():
            m, n = (side // shrink for side in sides)
            W = torch.randn(m, n, generator=source)
            if quantised:
                yield f"{prefix}.{name}.weight", (W * 64).to(torch.float8_e4m3fn)
                scales = torch.rand(-(-m // BLOCK), -(-n // BLOCK), generator=source) + 0.5
                yield f"{prefix}.{name}.weight_scale_inv", scales * 1e-3
            else:
                yield f"{prefix}.{name}.weight", W.bfloat16()

    def ends() -> Iterator[tuple[str, Tensor]]:
        for name in ("model.embed_tokens", "lm_head"):
            yield (
                f"{name}.weight",
                torch.randn(WORDS // shrink, WIDTH // shrink, generator=source).bfloat16(),
            )

    for layer in range(layers):
        write(f"layer-{layer}.safetensors", matrices(f"model.layers.{layer}"))
    write("ends.safetensors", ends())
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)
    config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16"}
    if quantised:
        sizes = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
        config["quantization_config"] = sizes
    (folder / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Writes a safetensors file, one tensor at a time; returns the names."""
    header: dict[str, Any] = {}
    body, end = path.with_suffix(".body"), 0
    with body.open("wb") as file:
        for name, tensor in tensors:
            file.write(tensor.view(torch.uint8).numpy().tobytes())
            header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape)}
            header[name]["data_offsets"] = [end, file.tell()]
            end = file.tell()
    text = json.dumps(header).encode()
    with path.open("wb") as file, body.open("rb") as rest:
        file.write(len(text).to_bytes(8, "little") + text)
        while piece := rest.read(1 << 24):
            file.write(piece)
    body.unlink()
    return list(header)
