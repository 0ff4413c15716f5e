#!/usr/bin/env bash
# mistral-common 1.13.1 with its own tokenizers v1, v2 and v3 (sentencepiece): a chat with a system prompt.
# Guess: the tokens of a conversation begin with the tokens of its first turn, as long as nothing before was changed.
# Seen: true of v1. In v2 and v3 the system prompt stands in the last user turn: with the second question it leaves
#   the first turn and goes to the second, so what the model was shown when it gave its first answer is not what
#   stands there later.
# Hurts: training on several turns from one rendered conversation (the first answer is trained without the system
#   prompt it was sampled with), masks by prefix length, prefix caches.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check "mistral-common[sentencepiece]==1.13.1"
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

first = [SystemMessage(content="Be brief."), UserMessage(content="Hi")]
second = [*first, AssistantMessage(content="Hello."), UserMessage(content="Bye")]
print("mistral-common", metadata.version("mistral-common"))
print("guess: the first turn is a prefix of the longer conversation")
found = {}
for name in ("v1", "v2", "v3"):
    tokenizer = getattr(MistralTokenizer, name)()
    short = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=first))
    long = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=second))
    found[name] = long.tokens[: len(short.tokens)] == short.tokens
    print(f"seen in {name}: prefix {found[name]}: {short.text} -> {long.text}")
assert found == {"v1": True, "v2": False, "v3": False}, "the behaviour has changed"
EOF
