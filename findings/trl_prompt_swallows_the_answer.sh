#!/usr/bin/env bash
# trl 1.16.0 (torch 2.13.0, transformers 5.23.0): extract_prompt, which the preference trainers apply to pairs of
#   texts without a prompt column.
# Guess: the prompt ends where the two answers begin, or at least between two words.
# Seen: the prompt is all the text that both share, up to the letter. For "... The sky is blue." against "... The sky
#   is blue" the prompt becomes "... The sky is blu", the chosen answer "e." and the rejected one "e".
# Hurts: pairs that differ late (edits, refusals with the same opening): most of the better answer is never trained,
#   and the rest begins within a word, with tokens that a model never samples there.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 trl==1.16.0
venv/bin/python -I - <<'EOF'
import trl
from trl.data_utils import extract_prompt

question = "Why is it so? "
pair = {"chosen": question + "The sky is blue.", "rejected": question + "The sky is blue"}
seen = extract_prompt(pair)
print("trl", trl.__version__)
print("guess:", {"prompt": question, "chosen": "The sky is blue.", "rejected": "The sky is blue"})
print("seen:", seen)
assert seen == {"prompt": question + "The sky is blu", "chosen": "e.", "rejected": "e"}, "the behaviour has changed"
EOF
