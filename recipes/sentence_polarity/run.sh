#!/usr/bin/env bash
# An encoder and a decoder reward model of short film reviews, on a CPU; see README.md.
# bash recipes/sentence_polarity/run.sh snippets.jsonl.gz reviews.jsonl.gz
set -euo pipefail
snippets=$(realpath "$1")
reviews=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=outputs/sentence_polarity

python recipes/sentence_polarity/pairs.py --dataset_name "$snippets" --more_texts "$reviews" --output_dir $out/data
python recipes/sentence_polarity/base.py --kind encoder --output_dir $out/encoder_base
python recipes/sentence_polarity/base.py --kind decoder --attention_dropout 0.6 --output_dir $out/decoder_base
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/reward.py --config recipes/sentence_polarity/encoder.yaml
accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/reward.py --config recipes/sentence_polarity/decoder.yaml
python recipes/sentence_polarity/compare.py --reward_models $out/encoder
python recipes/sentence_polarity/compare.py --reward_models $out/decoder
