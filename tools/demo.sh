#!/usr/bin/env bash
# What `make demo` shows: a question about a text of 7,600 tokens, answered out of a compressed cache, then memory and
# decode speed beside an f16 cache on the same text.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

model=models/SmolLM2-135M-Instruct.Q4_1.gguf
text=/usr/share/common-licenses/GPL-3 # every Debian has it
[[ -r $text ]] || { echo "demo: $text is not there; name another long text with: build/narrows run -m $model -f FILE -p QUESTION" >&2; exit 1; }

# show COMMAND...: the command as a user would type it, then what it prints.
show() {
  local word
  printf '\n$'
  for word; do
    [[ $word == *[[:space:]]* ]] && printf ' "%s"' "$word" || printf ' %s' "$word"
  done
  printf '\n'
  "$@"
}

show build/narrows run -m "$model" -f "$text" -p "In one sentence: what is this document?" --temp 0 --seed 1 -n 128
show build/narrows bench -m "$model" -f "$text" --context 7600 --kv f16,klt,sals-25
