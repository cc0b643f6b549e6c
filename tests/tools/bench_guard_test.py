"""tools/bench_guard.py with binaries that only pretend: scripts that print what a run would have measured."""
import json
import os
import subprocess
import sys
import tempfile
import unittest

GUARD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tools", "bench_guard.py")


class BenchGuard(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def binary(self, name, decode, prefill=(0,), kv="klt"):
        """A `narrows` whose run i decodes at decode[i]; it writes its name and arguments to the log."""
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(
                f"""#!{sys.executable}
import json, os, sys
count = {self.path(name + ".count")!r}
i = int(open(count).read()) if os.path.exists(count) else 0
open(count, "w").write(str(i + 1))
open({self.path("log")!r}, "a").write({name!r} + " " + " ".join(sys.argv[1:]) + "\\n")
decode, prefill = {list(decode)!r}, {list(prefill)!r}
rows = [{{"engine": "narrows", "kv": {kv!r}, "context": 0, "prefill_tok_s": prefill[i % len(prefill)],
          "decode_tok_s": decode[i % len(decode)]}},
        {{"engine": "llama.cpp", "kv": "f16", "context": 0, "prefill_tok_s": 0, "decode_tok_s": 1 + i}}]
print(json.dumps(rows))
"""
            )
        os.chmod(self.path(name), 0o755)
        return self.path(name)

    def guard(self, old, new, *more):
        return subprocess.run(
            [sys.executable, GUARD, old, new, "-m", "model.gguf", *more], capture_output=True, text=True, check=False
        )

    def test_ranges_that_overlap_pass(self):
        # The median is 10% lower, but one run reached what the old one did.
        done = self.guard(self.binary("old", [100, 104, 108]), self.binary("new", [90, 90, 101]), "--runs", "3")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("same", done.stdout)
        self.assertIn("0.865", done.stdout)

    def test_touching_ranges_pass(self):
        done = self.guard(self.binary("old", [100, 104]), self.binary("new", [90, 100]), "--runs", "2")
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_a_range_wholly_below_fails(self):
        done = self.guard(self.binary("old", [100, 104, 108]), self.binary("new", [97, 98, 99.9]), "--runs", "3")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("slower", done.stdout)

    def test_slower_prefill_fails_though_decoding_is_faster(self):
        done = self.guard(self.binary("old", [100], [500]), self.binary("new", [200], [400]), "--runs", "2")
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("faster", done.stdout)
        self.assertIn("slower", done.stdout)

    def test_faster_passes(self):
        done = self.guard(self.binary("old", [100, 104]), self.binary("new", [105, 120]), "--runs", "2")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("faster", done.stdout)

    def test_runs_are_interleaved_and_options_are_passed_on(self):
        done = self.guard(
            self.binary("old", [1]), self.binary("new", [1]), "--runs", "4", "--context", "0,64", "--", "--threads", "1"
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        with open(self.path("log"), encoding="utf-8") as file:
            log = file.read().splitlines()
        self.assertEqual([line.split()[0] for line in log], ["old", "new", "new", "old", "old", "new", "new", "old"])
        for line in log:
            self.assertEqual(
                line.split()[1:],
                "bench -m model.gguf --context 0,64 --kv f16,klt --threads 1 --json".split(),
            )

    def test_a_binary_that_fails_is_not_a_regression(self):
        broken = self.path("broken")
        with open(broken, "w", encoding="utf-8") as file:
            file.write("#!/bin/sh\nexit 2\n")
        os.chmod(broken, 0o755)
        done = self.guard(self.binary("old", [1]), broken)
        self.assertEqual(done.returncode, 2)
        self.assertIn("broken", done.stderr)
        self.assertEqual(self.guard(self.binary("old", [1]), self.path("missing")).returncode, 2)

    def test_other_output_is_refused(self):
        for i, text in enumerate(["", "{}", json.dumps([{"engine": "narrows"}]), "[]"]):
            odd = self.path(f"odd{i}")
            with open(odd, "w", encoding="utf-8") as file:
                file.write(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
            os.chmod(odd, 0o755)
            self.assertEqual(self.guard(odd, odd).returncode, 2, text)

    def test_different_profiles_cannot_be_compared(self):
        done = self.guard(self.binary("old", [1], kv="klt"), self.binary("new", [1], kv="f16"))
        self.assertEqual(done.returncode, 2)

    def test_no_runs_are_refused(self):
        self.assertEqual(self.guard("a", "b", "--runs", "0").returncode, 2)


if __name__ == "__main__":
    unittest.main()
