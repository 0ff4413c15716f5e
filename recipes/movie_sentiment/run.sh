#!/usr/bin/env bash
# Rows, SFT, reward model, judge and PPO on film reviews. One GPU; see README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=outputs/movie_sentiment

python recipes/sentiment_pairs.py --dataset_name stanfordnlp/imdb --output_dir $out/data
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/sft.py --config recipes/movie_sentiment/sft.yaml
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/reward.py --config recipes/movie_sentiment/reward.yaml

# The judge is a second reward model, from pairs that the first has not seen. PPO does not see its scores.
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/reward.py --config recipes/movie_sentiment/reward.yaml \
  --dataset_name $out/data/judge_pairs --seed 1 --output_dir $out/judge

accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/ppo.py --config recipes/movie_sentiment/ppo.yaml
