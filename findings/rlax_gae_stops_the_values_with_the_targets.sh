#!/usr/bin/env bash
# rlax 0.1.9 (jax 0.10.2): truncated_generalized_advantage_estimation in a value loss, beside vtrace.
# Guess: on-policy both give the same errors, and with stop_target_gradients=True both hold the targets constant: the
#   gradient of 0.5 * error**2 is minus the error for each value.
# Seen: the errors are the same, and so is vtrace's gradient. For the advantages the flag stops everything, the value
#   itself too: the gradient is 0 everywhere and the value head never learns. Without the flag, which is the default
#   here, the gradient also flows into the bootstrap values, and the last one is pushed down to meet the prediction.
#   Neither setting gives the usual gradient.
# Hurts: actor-critic code that squares these advantages for its value loss: the critic stands still, or learns a
#   residual gradient.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check rlax==0.1.9 jax==0.10.2
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

import jax
import jax.numpy as jnp
import rlax

ones, discounts, values = jnp.ones(3), jnp.full(3, 0.9), jnp.array([0.1, 0.2, 0.3, 0.4])


def gae(v, stop):
    return rlax.truncated_generalized_advantage_estimation(ones, discounts, 0.95, v, stop_target_gradients=stop)


def vtrace(v):
    return rlax.vtrace(v[:-1], v[1:], ones, discounts, ones, lambda_=0.95, stop_target_gradients=True)


def gradient(errors):
    return jax.grad(lambda v: 0.5 * (errors(v) ** 2).sum())(values)


advantages = gae(values, True)
guess = jnp.append(-advantages, 0.0)
stopped, free = gradient(lambda v: gae(v, True)), gradient(lambda v: gae(v, False))
print("rlax", metadata.version("rlax"), "jax", jax.__version__)
print("errors:", advantages.tolist(), "by vtrace", vtrace(values).tolist())
print("guess:", guess.tolist())
print("seen: vtrace", gradient(vtrace).tolist())
print("seen: GAE with stopped targets", stopped.tolist(), "and by default", free.tolist())
assert jnp.allclose(vtrace(values), advantages, atol=1e-5)
assert jnp.allclose(gradient(vtrace), guess, atol=1e-5)
assert not stopped.any(), "the behaviour has changed"
assert free[-1] > 1, "the behaviour has changed"
EOF
