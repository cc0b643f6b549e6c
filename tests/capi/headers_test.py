#!/usr/bin/env python3
"""Every public header compiles alone, with include/ as the only folder: headers_test.py INCLUDE CC CXX.

narrows.h as C99 and as C++."""
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

print(f"{len(headers)} headers")
