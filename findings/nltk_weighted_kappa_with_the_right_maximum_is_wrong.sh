#!/usr/bin/env bash
# nltk 3.10.4: metrics.agreement.AnnotationTask.weighted_kappa.
# Guess: max_distance is the largest distance that two labels can have; for grades from 1 to 5 under
#   interval_distance (squared differences) that is 16. It scales both disagreements and leaves kappa as it is.
# Seen: only the disagreement by chance is divided by it, the observed one is not. With the true maximum, kappa is
#   -2.78 (below its least value) for judges who agree rather well; with the default 1.0 it is the textbook's 0.76.
# Hurts: whoever fills in the argument as its name says: good annotators are thrown out.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check nltk==3.10.4
venv/bin/python -I - <<'EOF'
import nltk
from nltk.metrics import interval_distance
from nltk.metrics.agreement import AnnotationTask

person = [1, 1, 2, 5, 5, 2, 1, 5]
judge = [1, 2, 2, 5, 5, 1, 1, 2]
n = len(person)
observed = sum((a - b) ** 2 for a, b in zip(person, judge)) / n
chance = sum((a - b) ** 2 for a in person for b in judge) / n**2
guess = 1 - observed / chance
rows = [("person", str(i), g) for i, g in enumerate(person)] + [("judge", str(i), g) for i, g in enumerate(judge)]
task = AnnotationTask(rows, distance=interval_distance)
default, right = task.weighted_kappa(), task.weighted_kappa(max_distance=16)
print("nltk", nltk.__version__)
print(f"guess: {guess:.4f} for every max_distance, which cancels")
print(f"seen: {default:.4f} by default, {right:.4f} with the largest distance of the scale")
assert abs(default - guess) < 1e-12
assert abs(right - (1 - 16 * observed / chance)) < 1e-12 and right < -2, "the behaviour has changed"
EOF
