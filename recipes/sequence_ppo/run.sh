#!/usr/bin/env bash
# PPO with the completion as one action on the quickstart's world: makes world, SFT and reward model if they are not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ -e outputs/quickstart/reward/evaluation.json ] || bash recipes/quickstart/run.sh

[ -e outputs/sequence_ppo/ppo/evaluation.json ] || accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/ppo.py --config recipes/sequence_ppo/ppo.yaml
