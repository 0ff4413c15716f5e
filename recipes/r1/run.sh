#!/usr/bin/env bash
# R1-Zero in the small: questions -> a base that has read worked examples with slips -> GRPO on it -> report.
# A stage that is finished is not run again: remove its folder to repeat it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=outputs/r1

[ -e $out/tasks/train.jsonl ] || python recipes/r1/tasks.py --output_dir $out/tasks --texts 12000
[ -e $out/base/evaluation.json ] || python recipes/base.py --dataset_name $out/tasks/texts.jsonl \
  --output_dir $out/base --vocab_size 400 --hidden_size 64 --layers 2 --heads 2 --context_length 96 \
  --max_length 96 --num_train_epochs 8 --batch_size 32 --learning_rate 3e-3
[ -e $out/grpo/evaluation.json ] || accelerate launch --config_file recipes/accelerate/single_process.yaml \
  recipes/r1/train.py --config recipes/r1/grpo.yaml

# What came out, as one page to open with a double click; its path is printed
python -m rlhf_recipes.tools.report $out
