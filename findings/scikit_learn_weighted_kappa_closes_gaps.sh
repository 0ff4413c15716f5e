#!/usr/bin/env bash
# scikit-learn 1.9.1 (numpy 2.4.6): cohen_kappa_score with weights, when a grade of the scale was never given.
# Guess: with weights="quadratic" two judges who say 2 and 5 are three grades apart, so 9 counts.
# Seen: the distance is taken between places in the sorted list of grades that occur. If nobody said 3 or 4, the
#   grades 2 and 5 are neighbours: kappa is 0.727 where the distances of the grades give 0.763. No warning.
# Hurts: whoever reports how well a judge model agrees with people on a 1 to 5 scale: a sample without a grade is on
#   another scale than the next one. Passing labels=[1, 2, 3, 4, 5] cures it.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.6
venv/bin/python -I - <<'EOF'
import numpy as np
import sklearn
from sklearn.metrics import cohen_kappa_score

person = np.array([1, 1, 2, 5, 5, 2, 1, 5])
judge = np.array([1, 2, 2, 5, 5, 1, 1, 2])
observed = np.mean((person - judge) ** 2)
chance = np.mean((person[:, None] - judge[None, :]) ** 2)
guess = 1 - observed / chance
seen = cohen_kappa_score(person, judge, weights="quadratic")
cured = cohen_kappa_score(person, judge, weights="quadratic", labels=[1, 2, 3, 4, 5])
print("scikit-learn", sklearn.__version__)
print(f"guess, from the distances of the grades: {guess:.4f}")
print(f"seen: {seen:.4f}; with the whole scale as labels: {cured:.4f}")
assert abs(cured - guess) < 1e-12, "the whole scale no longer gives the distances of the grades"
assert abs(seen - 8 / 11) < 1e-12, "the behaviour has changed"
EOF
