#!/usr/bin/env bash
# compressed-tensors 0.20.1 reads 3-bit weights that 0.17.1 packed with other codes, silently.
#
# Up to 0.17.1, `pack-quantized` stored 32 // bits codes in each 32-bit word. From 0.18.0 on, a code
# can cross from one word to the next. The format kept its name. A file contains the version that
# wrote it, but the library checks neither the version nor the number of words (10 in the old layout
# and 9 in the new one for 96 codes of 3 bits). This affects 3, 5, 6 and 7 bits; 2, 4 and 8
# divide 32.
#
# Seen with torch 2.13.0, a weight of 8 x 96 with a scale per row:
#     words per row: 10; 0.20.1 would write 9
#     codes that are read back as others: 77%
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    transformers==5.24.0 compressed-tensors==0.20.1
"$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/old" compressed-tensors==0.17.1
cd "$folder"
cat > args.py <<'PYTHON'
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

args = QuantizationArgs(num_bits=3, strategy="channel")
scheme = QuantizationScheme(targets=["Linear"], weights=args)
PYTHON
PYTHONPATH="$folder/old" "$folder/venv/bin/python" - <<'PYTHON'
import compressed_tensors
import torch
from args import scheme
from compressed_tensors.compressors import PackedQuantizationCompressor
from safetensors.torch import save_file

assert compressed_tensors.__version__ == "0.17.1"
torch.manual_seed(0)
parts = {"weight": torch.randint(-4, 4, (8, 96)).float(), "weight_scale": torch.ones(8, 1)}
packed = PackedQuantizationCompressor.compress(parts, scheme)
back = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
assert torch.equal(back, parts["weight"]), "0.17.1 reads what it has written"
save_file({name: one.contiguous() for name, one in packed.items()}, "packed.safetensors")
save_file({"weight": parts["weight"]}, "weight.safetensors")
PYTHON
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from args import scheme
from compressed_tensors.compressors import PackedQuantizationCompressor
from safetensors.torch import load_file

packed, weight = load_file("packed.safetensors"), load_file("weight.safetensors")["weight"]
parts = {"weight": weight, "weight_scale": torch.ones(8, 1)}
words = PackedQuantizationCompressor.compress(parts, scheme)["weight_packed"].shape[1]
read = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
wrong = float((read != weight).float().mean())
print(f"words per row: {packed['weight_packed'].shape[1]}; 0.20.1 would write {words}")
print(f"codes that are read back as others: {wrong:.0%}")
raise SystemExit(0 if wrong > 0.5 else 1)
PYTHON
