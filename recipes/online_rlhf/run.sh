#!/usr/bin/env bash
# Rounds of labels, reward models and PPO on the quickstart's world, whose SFT model is made if it is not there.
# Killed or interrupted, it goes on when it is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
launch="accelerate launch --config_file recipes/accelerate/single_process.yaml"

stage() { # stage FILE COMMAND...: run the command unless the file that it ends with is there
  if [ -e "$1" ]; then
    echo "== $1 is there: nothing to do."
  else
    echo "== making $1"
    "${@:2}"
  fi
}

# 0. The quickstart's world, and SFT on its demonstrations
stage outputs/quickstart/world/world.json python recipes/quickstart/world.py
stage outputs/quickstart/sft/evaluation.json $launch recipes/sft.py --config recipes/quickstart/sft.yaml

# 1. The rounds, and their page
python recipes/online_rlhf/rounds.py --config recipes/online_rlhf/online.yaml
rlhf-recipes report outputs/online_rlhf/online
