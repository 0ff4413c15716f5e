#!/usr/bin/env bash
# trueskill 0.4.5: TrueSkill.expose, which its documentation names as the key for sorting a leaderboard.
# Guess: the exposure is a careful estimate: the mean less about three standard deviations.
# Seen: the factor is mu / sigma of the environment: 3 at the usual 25 and 25/3, but 0 in an environment that is
#   centred on 0, where the exposure is the mean alone; and on a scale of 1000 with sigma 100 it is 10. With mu = 0 a
#   model of hardly any games stands above one that is known well.
# Hurts: arenas that centre their scores on 0 as Bradley-Terry ones do: the newest lucky model leads the table.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check trueskill==0.4.5
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

import trueskill


def order(mu, sigma):
    env = trueskill.TrueSkill(mu=mu, sigma=sigma, beta=sigma / 2, tau=sigma / 100)
    lucky = env.create_rating(mu + 2.0 * sigma, 0.95 * sigma)
    known = env.create_rating(mu + 1.9 * sigma, 0.10 * sigma)
    penalty = (lucky.mu - env.expose(lucky)) / lucky.sigma
    return penalty, "lucky newcomer" if env.expose(lucky) > env.expose(known) else "well-known model"


usual, centred, wide = order(25, 25 / 3), order(0, 25 / 3), order(1000, 100)
print("trueskill", metadata.version("trueskill"))
print("guess: the same penalty of three sigma, and the same leader, on each scale")
for name, (penalty, leader) in {"mu 25": usual, "mu 0": centred, "mu 1000, sigma 100": wide}.items():
    print(f"seen at {name}: {penalty:.1f} sigma, leader: {leader}")
assert abs(usual[0] - 3) < 1e-9 and usual[1] == "well-known model"
assert centred[0] == 0 and centred[1] == "lucky newcomer", "the behaviour has changed"
assert abs(wide[0] - 10) < 1e-9, "the behaviour has changed"
EOF
