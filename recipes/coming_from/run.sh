#!/usr/bin/env bash
# The quickstart's world with the settings of three other libraries; makes world, SFT and reward model if they are not there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
[ -e outputs/quickstart/reward/evaluation.json ] || bash recipes/quickstart/run.sh

accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/ppo.py --config recipes/coming_from/trl112.yaml
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/ppo.py --config recipes/coming_from/verl.yaml
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/ppo.py --config recipes/coming_from/openrlhf.yaml
