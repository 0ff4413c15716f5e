#!/usr/bin/env bash
# transformers 5.23.0 (tokenizers 0.23.3, jinja2 3.1.6): apply_chat_template with return_assistant_tokens_mask and
#   truncation on the left, which keeps the newest turns of a long chat.
# Guess: the mask marks those tokens of assistant turns that are left.
# Seen: if the first assistant turn lost its beginning, the mask is 0 everywhere, also over later turns that are
#   whole. With truncation on the right the turns that are left are marked.
# Hurts: SFT and multi-turn RL on long chats: such rows have no target, and the longest chats teach nothing.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
  transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
venv/bin/python -I - <<'EOF'
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = "<unk> <user> <assistant> <end> first question long old answer second new reply".split()
plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
tokenizer.chat_template = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} <end>{% endgeneration %}{% else %}{{ m.content }} <end>{% endif %} {% endfor %}"
)
chat = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "long old answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "new reply"},
]


def marked(side):
    tokenizer.truncation_side = side
    out = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=10
    )
    kept = tokenizer.convert_ids_to_tokens(out["input_ids"])
    return kept, [token for token, mask in zip(kept, out["assistant_masks"]) if mask]


(kept_left, left), (_, right) = marked("left"), marked("right")
print("transformers", transformers.__version__)
print("kept on the left:", kept_left)
print("guess: marked are", ["answer", "<end>", "new", "reply", "<end>"])
print("seen: marked are", left, "; after truncation on the right", right)
assert right == ["long", "old", "answer", "<end>"]
assert kept_left[-3:] == ["new", "reply", "<end>"]
assert left == [], "the behaviour has changed"
EOF
