#!/usr/bin/env bash
# datasets 5.2.0 (jinja2 3.1.6 to render): chats with tool calls whose arguments have different names.
# Guess: a row comes back as it was put in: a call of weather has {"city": ...} and a call of clock has {"zone":
#   ...}.
# Seen: all arguments of the column become one struct: each call has every name that any row uses, with None for what
#   it never had; plain messages gain tool_calls None. A template that writes the arguments as JSON shows the model
#   {"city": "Oslo", "zone": null}.
# Hurts: SFT and RL on tool use: the model learns to call each tool with the parameters of all others, set to null.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check datasets==5.2.0 jinja2==3.1.6
venv/bin/python -I - <<'EOF'
import datasets
from datasets import Dataset
from jinja2 import Environment


def row(name, **arguments):
    return {
        "messages": [
            {"role": "user", "content": "Please."},
            {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]},
        ]
    }


rows = [row("weather", city="Oslo"), row("clock", zone="CET")]
back = Dataset.from_list(rows)[0]["messages"]
render = Environment().from_string("{{ call.name }}({{ call.arguments | tojson }})").render
guess = render(call=rows[0]["messages"][1]["tool_calls"][0])
seen = render(call=back[1]["tool_calls"][0])
print("datasets", datasets.__version__)
print("guess:", guess)
print("seen:", seen, "and the user's message is", back[0])
assert guess == 'weather({"city": "Oslo"})'
assert seen == 'weather({"city": "Oslo", "zone": null})', "the behaviour has changed"
assert back[0].get("tool_calls", "absent") is None, "the behaviour has changed"
EOF
