#!/usr/bin/env python3
"""The examples say what the C++ API and the program say:

  examples_test.py GENERATE_C GENERATE_CPP --fixture CAPI_FIXTURE              a tiny model
  examples_test.py GENERATE_C GENERATE_CPP --program NARROWS --model MODEL     beside `narrows run --raw --greedy`
"""
import argparse
import json
import re
import subprocess
import tempfile

parser = argparse.ArgumentParser()
parser.add_argument("examples", nargs=2)
parser.add_argument("--fixture")
parser.add_argument("--program")
parser.add_argument("--model")
args = parser.parse_args()


def run(command, code=0):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == code, f"{command}: {done.returncode} {done.stderr.decode()}"
    return done.stdout, done.stderr.decode()


def check(model, prompt, n_tokens, want, n_cached):
    for example in args.examples:
        out, err = run([example, model, prompt, str(n_tokens)])
        assert out == want + b"\n", f"{example} said {out!r}, not {want!r}"
        report = re.fullmatch(r"(\d+) tokens in (\d+) bytes of cache \(f16: (\d+)\)\n", err)
        assert report, err
        assert int(report[1]) == n_cached if n_cached else int(report[1]) > n_tokens, err
        assert int(report[2]) > 0 and int(report[3]) > 0, err


if args.fixture:
    with tempfile.TemporaryDirectory() as folder:
        want = json.loads(run([args.fixture, folder])[0])
        assert len(want["said"]) > 3, want["said"]
        # The tiny vocabulary: a byte a token, and one pair.
        said = b"".join(bytes([t]) if t < 256 else b"??" for t in want["said"])
        assert b"??" not in said, want["said"]
        check(want["path"], want["text"], len(want["said"]), said, len(want["text_tokens"]) + len(want["said"]))
        for example in args.examples:
            assert "none.gguf" in run([example, folder + "/none.gguf", "a"], 1)[1]
            assert "kv-99" in run([example, want["path"], "a", "1", "kv-99"], 1)[1]
            assert "usage" in run([example], 2)[1]
else:
    prompt = "The three primary colours are"
    said, _ = run([args.program, "run", "-m", args.model, "--raw", "--greedy", "-n", "24", "-p", prompt])
    assert len(said) > 30 and said.endswith(b"\n"), said
    check(args.model, prompt, 24, said[:-1], 0)
