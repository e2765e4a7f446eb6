#!/usr/bin/env bash
# gptqmodel 7.7.0: the dequantiser of checkpoints (utils/model_dequant.py) returns other weights
# than those by which the layers multiply.
#
# AWQ: the packer stores column (0, 2, 4, 6, 1, 3, 5, 7)[k] of every 8 columns in the bits 4k to
# 4k + 3 of a word. The dequantiser reads them as columns 0 to 7 in order, for codes and zero
# points, but not for scales.
#
# GPTQ: in the format gptq, the library subtracts one from every zero point by a subtraction on the
# entire word, in which a zero point of 0 borrows from the next one. The layers add the ones to the
# entire word again. The dequantiser adds one to each zero point, so the zero points above a 0 are
# one too small.
#
# Seen with torch 2.13.0:
#     AWQ: 2954 of 4096 entries differ, the largest by 1.47 of the largest entry
#     GPTQ: 288 of 4096 entries differ, the largest by 0.06 of the largest entry
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 pillow==13.0.0 bitsandbytes==0.50.2
"$folder/venv/bin/pip" install --quiet --no-deps gptqmodel==7.7.0 defuser==0.0.28 \
    device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 threadpoolctl==3.8.0 tokenicer==0.0.14
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

# The package imports kernels; these modules work without it.
top = Path(importlib.util.find_spec("gptqmodel").origin).parent
for name in ("gptqmodel", "gptqmodel.models"):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(top.parent / name.replace(".", "/"))]
sys.modules["gptqmodel"].DEBUG_ON = False

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import FORMAT, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from gptqmodel.utils.model_dequant import convert_awq_file, convert_gptq_file
from safetensors.torch import save_file

torch.manual_seed(0)
M = N = 64
SIZE = 32
codes = torch.randint(0, 16, (N, M), dtype=torch.int32)
zeros = torch.randint(0, 16, (N // SIZE, M), dtype=torch.int32)
scales = torch.rand(N // SIZE, M).half()


def compare(kind, acting, file):
    wrong = file != acting
    largest = float((file - acting).abs().max() / acting.abs().max())
    print(
        f"{kind}: {int(wrong.sum())} of {acting.numel()} entries differ, the largest by "
        f"{largest:.2f} of the largest entry"
    )
    return bool(wrong.any())


qweight, qzeros = pack_awq(codes, zeros, 4)
save_file({"l.qweight": qweight, "l.qzeros": qzeros, "l.scales": scales}, "awq.safetensors")
acting = dequantize_gemm(qweight, qzeros, scales, 4, SIZE).T
file = convert_awq_file(Path("awq.safetensors"), torch.float16, "cpu")["l.weight"]
differs = compare("AWQ", acting, file)

layer = TorchLinear(
    bits=4, group_size=SIZE, sym=False, desc_act=False, in_features=N, out_features=M, bias=False,
    pack_dtype=torch.int32, register_buffers=True, format=FORMAT.GPTQ,
)
groups = torch.arange(N, dtype=torch.int32) // SIZE
linear = torch.nn.Linear(N, M, bias=False)
linear.weight.data = ((codes - zeros[groups]) * scales[groups]).T.half()
layer.pack_original(linear, scales.T, zeros.T, groups)
layer.qzero_format(format=2)
acting = layer.eval().dequantize_weight().T
convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=4))
tensors = {f"l.{name}": one.clone() for name, one in layer.state_dict().items()}
save_file(tensors, "gptq.safetensors")
settings = {"bits": 4, "checkpoint_format": "gptq"}
path = Path("gptq.safetensors")
file = convert_gptq_file(path, torch.float16, settings, "cpu")["l.weight"]
differs &= compare("GPTQ", acting, file)
raise SystemExit(0 if differs else 1)
PYTHON
