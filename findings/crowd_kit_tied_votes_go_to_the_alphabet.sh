#!/usr/bin/env bash
# crowd-kit 1.4.2 (pandas 2.3.3, numpy 1.26.4): aggregation.MajorityVote on pairs.
# Guess: where one annotator says A and one says B, the winner is drawn, or the pair is marked as undecided.
# Seen: every tie is won by the label that comes first in the alphabet, whatever the order of the votes: 100 of 100
#   ties go to A. Rename A to Z, and the same votes elect B. (Unpinned, with a pandas 3, all 100 went to B, the label
#   in the first row: an upgrade of pandas turns the winners round.)
# Hurts: preference data with an even number of votes: the answer shown first (A, left, model_1) wins all ties, and a
#   reward model learns the position.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  crowd-kit==1.4.2 pandas==2.3.3 numpy==1.26.4
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

import pandas as pd
from crowdkit.aggregation import MajorityVote


def winners(first, second):
    rows = []
    for pair in range(100):
        votes = [("w1", first), ("w2", second)]
        rows += [(pair, worker, label) for worker, label in (votes if pair % 2 else votes[::-1])]
    return MajorityVote().fit_predict(pd.DataFrame(rows, columns=["task", "worker", "label"])).value_counts().to_dict()


named, renamed = winners("A", "B"), winners("Z", "B")
print("crowd-kit", metadata.version("crowd-kit"), "pandas", pd.__version__)
print("guess: of 100 tied pairs about 50 to each side, or none decided")
print("seen:", named, "and after renaming A to Z:", renamed)
assert named == {"A": 100} and renamed == {"B": 100}, "the behaviour has changed"
EOF
