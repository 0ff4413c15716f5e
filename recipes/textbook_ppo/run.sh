#!/usr/bin/env bash
# PPO by the textbook on the quickstart's world: makes the world, the SFT model and the reward model if they are not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ -e outputs/quickstart/reward/evaluation.json ] || bash recipes/quickstart/run.sh

accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/ppo.py --config recipes/textbook_ppo/ppo.yaml
