#!/usr/bin/env bash
# statsmodels 0.15.0 (numpy 1.26.4, scipy 1.12.0; krippendorff 0.9.0 as the reference): aggregate_raters,
#   fleiss_kappa.
# Guess: NaN marks a vote that was not cast; it is left out, or refused.
# Seen: NaN becomes a category of its own, so two people who both did not vote agree. Votes that agree less often
#   than chance (alpha -0.28 on the votes that were cast) come out as a positive Fleiss kappa, 0.16.
# Hurts: teams whose annotators each see a part of the pairs: the more votes are missing, the better the agreement.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  statsmodels==0.15.0 krippendorff==0.9.0 numpy==1.26.4 scipy==1.12.0
venv/bin/python -I - <<'EOF'
import krippendorff
import numpy as np
import statsmodels
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

no = np.nan
votes = np.array(
    [
        [1, 2, no, no, no, no],
        [2, 1, no, no, no, no],
        [1, 1, 1, 2, 2, 2],
        [2, 2, 2, 1, 1, 1],
        [1, 2, 1, 2, 1, 2],
        [2, no, no, no, no, no],
    ]
)
table, categories = aggregate_raters(votes)
kappa = fleiss_kappa(table)
alpha = krippendorff.alpha(reliability_data=votes.T, level_of_measurement="nominal")
print("statsmodels", statsmodels.__version__)
print(f"guess: at most zero, as on the votes that were cast (Krippendorff's alpha {alpha:.3f}), or an error")
print(f"seen: categories {categories.tolist()}, table {table.tolist()}, Fleiss kappa {kappa:.3f}")
assert alpha < -0.2
assert len(categories) == 3 and np.isnan(categories[-1]), "NaN is no longer a category"
assert abs(kappa - 0.16473317865429224) < 1e-9, "the behaviour has changed"
EOF
