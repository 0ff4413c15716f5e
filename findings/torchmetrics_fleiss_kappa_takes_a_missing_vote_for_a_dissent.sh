#!/usr/bin/env bash
# torchmetrics 1.9.0 (torch 2.13.0): functional.nominal.fleiss_kappa in mode "counts".
# Guess: four answers, each with unanimous votes, have kappa 1, also if two of them got two votes and not three (the
#   example in its documentation has rows with different totals); or the table is refused.
# Seen: the largest total is taken for the number of raters of every row, so a vote that was not cast counts against
#   the agreement: 0.36 for votes that never differ. No warning. (statsmodels refuses the same table.)
# Hurts: whoever watches the agreement of annotators in a training log while votes are still coming in.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0
venv/bin/python -I - <<'EOF'
import torch
import torchmetrics
from torchmetrics.functional.nominal import fleiss_kappa

full = fleiss_kappa(torch.tensor([[3, 0], [0, 3], [3, 0], [0, 3]])).item()
fewer = fleiss_kappa(torch.tensor([[3, 0], [0, 3], [2, 0], [0, 2]])).item()
print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
print("guess: 1.0 for both tables, since no two votes on an answer differ")
print(f"seen: {full:.4f} with three votes everywhere, {fewer:.4f} with two votes on two answers")
assert abs(full - 1) < 1e-4
assert abs(fewer - 0.3617) < 1e-3, "the behaviour has changed"
EOF
