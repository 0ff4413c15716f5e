#!/usr/bin/env bash
# tianshou 2.0.1 (torch 2.13.0): ReplayBuffer.add of one step after another.
# Guess: actions, observations and numbers in info come back as they were put in.
# Seen: the type of the first step is the type of the buffer: if the first action (or observation, or number in info)
#   is a whole Python number, say 0, then 0.7 and 1.5 that come later are stored as 0 and 1. Rewards are always
#   floats.
# Hurts: continuous control with a hand-written first action of 0, and log-probs or KL kept in info that begin with
#   0: the ratios are computed from rounded numbers. No warning.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 tianshou==2.0.1
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

from tianshou.data import Batch, ReplayBuffer


def stored(zero):
    buffer = ReplayBuffer(8)
    for step, value in enumerate([zero, 0.7, 1.5]):
        buffer.add(
            Batch(
                obs=value, act=value, rew=value, terminated=False, truncated=step == 2, obs_next=value,
                info={"kl": value},
            )
        )
    return {
        "act": buffer.act[:3].tolist(), "obs": buffer.obs[:3].tolist(), "rew": buffer.rew[:3].tolist(),
        "info.kl": buffer.info.kl[:3].tolist(),
    }


seen, floats = stored(0), stored(0.0)
print("tianshou", metadata.version("tianshou"))
print("guess: [0.0, 0.7, 1.5] everywhere")
print("seen after a first 0:", seen)
print("seen after a first 0.0:", floats)
assert all(values == [0.0, 0.7, 1.5] for values in floats.values())
assert seen["act"] == seen["obs"] == seen["info.kl"] == [0, 0, 1], "the behaviour has changed"
assert seen["rew"] == [0.0, 0.7, 1.5]
EOF
