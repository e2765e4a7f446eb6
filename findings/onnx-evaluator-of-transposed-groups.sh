#!/usr/bin/env bash
# onnx 1.23.2: ReferenceEvaluator does not compute a ConvTranspose with several groups.
#
# For 4 input channels, it computes one group with a kernel of shape (4, 2, 3). It raises a
# ValueError for two groups with 1 and with 2 output channels per group. It splits the kernel by
# output channels, although the first side of the kernel counts input channels.
#
# Seen:
#     1 group of 2 channels: shape (1, 2, 7)
#     2 groups of 1 channel: ValueError
#     2 groups of 2 channels: ValueError
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

seen = []
for groups, channels in ((1, 2), (2, 1), (2, 2)):
    W = numpy_helper.from_array(np.ones((4, channels, 3), np.float32), "W")
    node = helper.make_node("ConvTranspose", ["X", "W"], ["Y"], group=groups)
    X, Y = (helper.make_tensor_value_info(name, 1, None) for name in "XY")
    model = helper.make_model(helper.make_graph([node], "g", [X], [Y], [W]))
    try:
        (result,) = ReferenceEvaluator(model).run(None, {"X": np.ones((1, 4, 5), np.float32)})
        seen.append(f"shape {result.shape}")
    except ValueError:
        seen.append("ValueError")
    of = f"{groups} group{'s' * (groups > 1)} of {channels} channel{'s' * (channels > 1)}"
    print(f"{of}: {seen[-1]}")
raise SystemExit(0 if seen == ["shape (1, 2, 7)", "ValueError", "ValueError"] else 1)
PYTHON
