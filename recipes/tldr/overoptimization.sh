#!/usr/bin/env bash
# PPO with several KL coefficients, and one page that draws reward and gold score of the policies against their KL.
# bash recipes/tldr/overoptimization.sh [YAML]    A run that is finished is not made again.
set -euo pipefail
config=$(realpath "${1:-$(dirname "${BASH_SOURCE[0]}")/ppo.yaml}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=outputs/tldr/overoptimization
for kl in ${KL_COEFS:-0 0.01 0.02 0.05 0.1 0.2 0.5}; do
  if [ -e "$out/kl_$kl/evaluation.json" ]; then
    echo "== $out/kl_$kl is there: nothing to do."
  else
    accelerate launch --config_file recipes/accelerate/single_process.yaml recipes/ppo.py --config "$config" \
      --kl_coef "$kl" --output_dir "$out/kl_$kl"
  fi
done
python -m rlhf_recipes.tools.report $out
