#!/usr/bin/env python3
"""libnarrows.so shows our API and nothing else: symbols_test.py LIBRARY NM.

Another copy of llama.cpp, ggml or nlohmann/json in the same process must not meet ours."""
import os
import re
import subprocess
import sys

LIBRARY, NM = sys.argv[1:3]
HEADER = os.path.join(os.path.dirname(__file__), "../../include/narrows/narrows.h")
OURS = re.compile(r"narrows_\w+$|narrows::(Model|Session|DecodeBatch|Sampler|Tokenizer|Utf8Stream|KvProfile)::[a-z~]\w*(\[abi:cxx11\])?\(|"
                  r"narrows::(save_session|load_session|cache_bytes_estimate|memory_stats|set_memory_limit|parse_attention|parse_prefill|attention_names?)(\[abi:cxx11\])?\(")

lines = subprocess.run([NM, "-D", "-C", "--defined-only", LIBRARY], stdout=subprocess.PIPE, check=True,
                       text=True).stdout.splitlines()
shown = [line.split(None, 2)[2] for line in lines]
foreign = [s for s in shown if not OURS.match(s)]
assert not foreign, f"{len(foreign)} symbols are not of our API: {foreign[:10]}"

with open(HEADER, encoding="utf-8") as file:
    text = re.sub(r"/\*.*?\*/", "", file.read(), flags=re.DOTALL)
text = re.sub(r"static inline .*?\n}", "", text, flags=re.DOTALL)
declared = set(re.findall(r"\b(narrows_\w+)\(", text))
assert len(declared) > 40, declared
missing = sorted(declared - set(shown))
assert not missing, f"declared and not exported: {missing}"
extra = sorted(s for s in shown if s.startswith("narrows_") and s not in declared)
assert not extra, f"exported and not declared: {extra}"
for name in ("narrows::Model::load(", "narrows::Session::prefill(", "narrows::Sampler::sample(", "narrows::KvProfile::parse(",
             "narrows::load_session(", "narrows::Tokenizer::encode("):
    assert any(s.startswith(name) for s in shown), f"{name}) is not exported"
print(f"{len(declared)} functions of the C API, {len(shown) - len(declared)} symbols of the C++ API")
