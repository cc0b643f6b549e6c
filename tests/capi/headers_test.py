#!/usr/bin/env python3
"""Every public header compiles alone, with include/ as the only folder: headers_test.py INCLUDE CC CXX.

narrows.h as C99 and as C++; what is inside a model or a session does not compile for others."""
import os
import subprocess
import sys

INCLUDE, CC, CXX = sys.argv[1:4]
STRICT = ["-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I", INCLUDE]
CPP = [CXX, "-std=c++20", "-x", "c++"]
C = [CC, "-std=c99", "-x", "c"]


def compiles(compiler, source):
    done = subprocess.run([*compiler, *STRICT, "-"], input=source, text=True, stderr=subprocess.PIPE)
    return done.returncode == 0, done.stderr


headers = sorted(os.listdir(os.path.join(INCLUDE, "narrows")))
assert "engine.h" in headers and "narrows.h" in headers, headers
for header in headers:
    twice = f'#include "narrows/{header}"\n' * 2
    for compiler in [CPP, C] if header == "narrows.h" else [CPP]:
        good, errors = compiles(compiler, twice + "int used;\n")
        assert good, f"{header} does not compile alone with {compiler[0]}:\n{errors}"

ALL = "".join(f'#include "narrows/{header}"\n' for header in headers)
INSIDES = {
    "model.info()": True,
    "session.n_past()": True,
    "model.parts()": False,
    "session.impl()": False,
    "model.tokenizer().impl()": False,
}
for expression, public in INSIDES.items():
    source = ALL + f"void f(const narrows::Model& model, narrows::Session& session) {{\n" \
        f"  (void)&model; (void)&session; (void)({expression}); }}\n"
    good, errors = compiles(CPP, source)
    assert good == public, f"{expression} {'compiles' if good else 'does not compile'}:\n{errors}"
print(f"{len(headers)} headers")
