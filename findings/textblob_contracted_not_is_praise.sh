#!/usr/bin/env bash
# textblob 0.20.1: the polarity of a sentence.
# Guess: "is not good" and "isn't good" mean the same and get the same negative polarity.
# Seen: the written-out form gets -0.35; the contraction gets +0.7, exactly as "is good". So do "wasn't" and
#   "aren't".
# Hurts: sentiment as a reward or a filter of feedback: in the short forms of everyday speech each complaint is
#   praise.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check textblob==0.20.1
venv/bin/python -I - <<'EOF'
import importlib.metadata as metadata

from textblob import TextBlob


def polarity(text):
    return TextBlob(text).sentiment.polarity


pairs = [
    ("This answer is not good.", "This answer isn't good."),
    ("The examples were not useful.", "The examples weren't useful."),
    ("It was not great.", "It wasn't great."),
]
print("textblob", metadata.version("textblob"))
print("guess: the same sign in both columns")
for full, short in pairs:
    print(f"seen: {polarity(full):+.2f} {full!r}   {polarity(short):+.2f} {short!r}")
assert all(polarity(full) < 0 for full, _ in pairs)
assert all(polarity(short) > 0 for _, short in pairs), "the behaviour has changed"
assert abs(polarity("This answer isn't good.") - polarity("This answer is good.")) < 1e-9, "the behaviour has changed"
EOF
