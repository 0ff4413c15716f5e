#!/usr/bin/env bash
# gguf 0.19.0 (numpy 2.4.6): quants.quantize to Q8_0, as when an adapter is converted to GGUF at that type.
# Guess: eight bits are nearly lossless, with an error below one per cent of each block, for small weights as for
#   large ones, since each block of 32 has its own scale.
# Seen: the scale is a float16. LoRA's B starts at zero and after a few updates at 1e-6 holds weights of that size:
#   the scale, a 127th of the largest, is below the least float16 and becomes 0, and the whole matrix with it. At
#   1e-5 the error is still above 10 per cent; at 1e-2 it is the expected half a per cent. No word of it.
# Hurts: early or gently trained adapters served by llama.cpp: the server runs the base model.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

kind = GGMLQuantizationType.Q8_0
rng = np.random.default_rng(0)
shape = rng.uniform(-1, 1, (64, 32)).astype(np.float32)


def error(size):
    weights = (size * shape).astype(np.float32)
    back = dequantize(quantize(weights, kind), kind)
    return float(np.linalg.norm(back - weights) / np.linalg.norm(weights)), float(np.abs(back).max())


print("gguf", metadata.version("gguf"), "numpy", np.__version__)
print("guess: a relative error of about 0.005 at each size")
for size in (1e-2, 1e-4, 1e-5, 1e-6):
    print(f"seen at weights up to {size:g}: relative error {error(size)[0]:.4f}")
assert error(1e-2)[0] < 0.01
assert error(1e-5)[0] > 0.1, "the behaviour has changed"
assert error(1e-6) == (1.0, 0.0), "the behaviour has changed"
EOF
