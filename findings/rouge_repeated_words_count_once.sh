#!/usr/bin/env bash
# rouge 1.0.1 beside rouge-score 0.1.2: precision of ROUGE-1.
# Guess: each of eight words "cat" has to be matched: the reference has one, so precision is 1/8.
# Seen: rouge compares sets of n-grams unless exclusive=False is asked for, so a word said eight times has precision
#   1.0, as if said once. rouge-score, which many take for the same thing, gives 0.125.
# Hurts: whoever rewards summaries by it: saying one word of the reference for ever is perfectly precise.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check rouge==1.0.1 rouge-score==0.1.2
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

from rouge import Rouge
from rouge_score import rouge_scorer

reference, answer = "the cat sat on the mat", " ".join(["cat"] * 8)
sets = Rouge().get_scores(answer, reference)[0]["rouge-1"]["p"]
counted = Rouge(exclusive=False).get_scores(answer, reference)[0]["rouge-1"]["p"]
other = rouge_scorer.RougeScorer(["rouge1"]).score(reference, answer)["rouge1"].precision
print("rouge", metadata.version("rouge"), "rouge-score", metadata.version("rouge-score"))
print("guess: precision 0.125 in both packages")
print(f"seen: rouge {sets:.3f} (exclusive=False: {counted:.3f}), rouge-score {other:.3f}")
assert abs(other - 0.125) < 1e-9 and abs(counted - 0.125) < 1e-6
assert abs(sets - 1) < 1e-6, "the behaviour has changed"
EOF
