#!/usr/bin/env bash
# SFT, reward model and PPO on Anthropic's helpful and harmless dialogues. One GPU; see README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/sft.py --config recipes/hh_rlhf/sft.yaml
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/reward.py --config recipes/hh_rlhf/reward.yaml
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/ppo.py --config recipes/hh_rlhf/ppo.yaml
