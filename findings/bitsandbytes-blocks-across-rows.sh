#!/usr/bin/env bash
# bitsandbytes 0.50.2: on a CPU, NF4 and FP4 weights get wrong scales if their row length is not a
# multiple of the block size.
#
# A block of 64 entries can begin in one row and end in the next. For entry j of row i, the CPU
# kernel uses the scale i (n // 64) + j // 64, where n is the length of a row. With rows of 96, it
# advances by 1 scale per row instead of 1.5. It gives no warning. The library's implementation for
# any device returns the right entries.
#
# Seen with torch 2.13.0, on a CPU with AVX-512:
#     rows of  64 entries, blocks of  64: largest error  0.15 of the largest entry of its block
#     rows of  96 entries, blocks of  64: largest error 16.52 of the largest entry of its block
#     rows of 576 entries, blocks of 128: largest error 33.67 of the largest entry of its block
#     the same by the implementation for any device: 0.15, 0.15, 0.15
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
TORCHDYNAMO_DISABLE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.manual_seed(0)
SETTINGS = ((64, 64), (96, 64), (576, 128))
by_kernel, by_default = [], []
for columns, block in SETTINGS:
    # Blocks of different magnitudes, so that a wrong scale is noticed.
    blocks = 2.0 ** torch.randint(0, 6, (16 * columns // block, 1))
    W = (torch.randn(16 * columns // block, block) * blocks).reshape(16, columns)
    packed, state = quantize_4bit(W, blocksize=block, quant_type="nf4")
    scales = state.absmax.repeat_interleave(block).reshape(W.shape)
    kernel = dequantize_4bit(packed, state)
    default = _dequantize_4bit_compute(
        packed.flatten(), state.absmax, state.code, block, W.shape, torch.float32
    )
    by_kernel.append(float(((kernel - W).abs() / scales).max()))
    by_default.append(float(((default - W).abs() / scales).max()))
    print(
        f"rows of {columns:3} entries, blocks of {block:3}: largest error {by_kernel[-1]:5.2f} "
        "of the largest entry of its block"
    )
print(
    "the same by the implementation for any device: "
    + ", ".join(f"{error:.2f}" for error in by_default)
)
right = max(by_default) < 0.2 and by_kernel[0] < 0.2
wrong = min(by_kernel[1:]) > 1
raise SystemExit(0 if right and wrong else 1)
PYTHON
