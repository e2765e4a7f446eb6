#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.compile reuses a graph in its disk cache after an operator has changed.
#
# A program registers an operator with torch.library.custom_op, with an implementation and a fake
# implementation for the compiler, and compiles a function that calls it. A second process registers
# an operator with the same name and schema that returns a vector instead of a number, as a new
# release of a library might, and compiles the same function. torch.compile takes the first graph
# from its cache, and the call fails at an assertion about the number of dimensions. With an empty
# cache, the second program runs. A library must therefore rename an operator whenever the shapes of
# its outputs change.
#
# Seen:
#     first: number
#     second, with the cache of the first: AssertionError
#     second, with an empty cache: vector
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 setuptools
cat > "$folder/program.py" <<'PYTHON'
import sys

import torch
from torch import Tensor

kind = sys.argv[1]


def empty(x: Tensor) -> Tensor:
    return x.new_zeros(()) if kind == "number" else x.new_zeros(3)


operator = torch.library.custom_op("example::make", empty, mutates_args=())
operator.register_fake(empty)


@torch.compile(fullgraph=True)
def call(x):
    return operator(x * 2) + 0


try:
    print("vector" if call(torch.ones(4)).ndim else "number")
except AssertionError:
    print("AssertionError")
PYTHON
run() {
    TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" "$folder/program.py" "$2"
}
first=$(run one number)
second=$(run one vector)
fresh=$(run two vector)
echo "first: $first"
echo "second, with the cache of the first: $second"
echo "second, with an empty cache: $fresh"
[[ $first == number && $second == AssertionError && $fresh == vector ]]
