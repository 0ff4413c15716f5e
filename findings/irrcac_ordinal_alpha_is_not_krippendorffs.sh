#!/usr/bin/env bash
# irrCAC 0.4.4 beside krippendorff 0.9.0 (numpy 1.26.4, scipy 1.12.0, pandas 2.3.3).
# Guess: "Krippendorff's alpha, ordinal" is one number; both packages print it, and naming the grades that nobody
#   gave changes nothing, since they have no votes.
# Seen: on interval data both say 0.7755. As ordinal, irrCAC says 0.690, krippendorff 0.735: irrCAC's ordinal weights
#   count the grades between two grades, Krippendorff's the votes between them. With the unused grades named, irrCAC
#   says 0.750.
# Hurts: whoever compares an alpha with one in a paper, or with a limit such as 0.7.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  irrCAC==0.4.4 krippendorff==0.9.0 numpy==1.26.4 scipy==1.12.0 pandas==2.3.3
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

import krippendorff
import pandas as pd
from irrCAC.raw import CAC

grades = pd.DataFrame({"person": [1, 1, 2, 5, 5, 2, 1, 5], "judge": [1, 2, 2, 5, 5, 1, 1, 2]})


def irrcac(weights, categories=None):
    table = CAC(grades, weights=weights, categories=categories)
    return float(table.krippendorff()["est"]["coefficient_value"])


def reference(level):
    return krippendorff.alpha(reliability_data=grades.to_numpy().T, level_of_measurement=level)


print("irrCAC", metadata.version("irrCAC"), "krippendorff", metadata.version("krippendorff"))
print(f"interval: {irrcac('quadratic'):.4f} and {reference('interval'):.4f}, the same")
print(f"guess for ordinal: the same again, {reference('ordinal'):.4f}")
print(f"seen: {irrcac('ordinal'):.4f}, and {irrcac('ordinal', [1, 2, 3, 4, 5]):.4f} with the unused grades named")
assert abs(irrcac("quadratic") - reference("interval")) < 1e-4
assert abs(reference("ordinal") - 0.73502) < 1e-4
assert abs(irrcac("ordinal") - 0.68966) < 1e-4, "the behaviour has changed"
assert abs(irrcac("ordinal", [1, 2, 3, 4, 5]) - 0.75) < 1e-4, "the behaviour has changed"
EOF
