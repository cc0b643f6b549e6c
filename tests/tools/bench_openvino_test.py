"""tools/bench_openvino.py with a `narrows` and an OpenVINO that only pretend."""
import os
import subprocess
import sys
import tempfile
import unittest

TOOL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "tools", "bench_openvino.py")

NUMPY = """
class Row(list):
    def __getitem__(self, i):
        return [list(self)] if i is None else list.__getitem__(self, i)
def array(x):
    return [Row(r) for r in x]
def roll(row, n):
    return Row([row[(i - n) % len(row)] for i in range(len(row))])
def resize(row, n):
    return Row([row[i % len(row)] for i in range(n)])
def ascontiguousarray(x):
    return x
"""

OPENVINO = """
class Tensor:
    def __init__(self, rows):
        self.rows = rows
"""

# Reads 2 tokens a millisecond and generates one in 20; prints what it was given.
GENAI = """
import sys
class GenerationConfig:
    pass
class Mean:
    def __init__(self, x):
        self.mean = x
class Result:
    def __init__(self, n):
        self.perf_metrics = self
        self.get_ttft, self.get_tpot = lambda: Mean(n / 2), lambda: Mean(20.0)
class Ids:
    def __init__(self, text):
        self.input_ids = self
        self.data = [[ord(c) for c in text]]
class LLMPipeline:
    def __init__(self, model, device):
        if "bad" in model:
            raise RuntimeError("Check failed\\n[load_gguf] no")
        self.encode = Ids
    def get_tokenizer(self):
        return self
    def generate(self, tensor, config):
        print("ids", len(tensor.rows[0]), tensor.rows[0][:3], config.max_new_tokens, config.min_new_tokens, file=sys.stderr)
        return Result(len(tensor.rows[0]))
"""

NARROWS = """#!{python}
import json, sys
a = sys.argv
kv, n = a[a.index("--kv") + 1], int(a[a.index("--context") + 1])
print(json.dumps([{{"engine": "narrows", "kv": kv, "context": n, "prefill_tok_s": 500.0, "decode_tok_s": {decode}}}]))
"""


class BenchOpenVino(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.write("text.txt", "abc")
        for name, text in (("numpy.py", NUMPY), ("openvino.py", OPENVINO), ("openvino_genai.py", GENAI)):
            self.write(name, text)

    def write(self, name, text):
        path = os.path.join(self.folder.name, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def run_tool(self, *more, decode=100.0, model="good.gguf", text="text.txt"):
        narrows = self.write("narrows", NARROWS.format(python=sys.executable, decode=decode))
        os.chmod(narrows, 0o755)
        return subprocess.run(
            [sys.executable, TOOL, narrows, "-m", model, "-f", os.path.join(self.folder.name, text), *more],
            capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": self.folder.name},
        )

    def test_ratios_of_prompt_and_decoding(self):
        done = self.run_tool("--context", "7,1000", "--rounds", "2", "--tokens", "9")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = [line.split() for line in done.stdout.splitlines()[1:]]
        self.assertEqual(rows, [["7", "decode", "100.0", "50.0", "2.00"], ["7", "prefill", "500.0", "2000.0", "0.25"],
                                ["1000", "decode", "100.0", "50.0", "2.00"], ["1000", "prefill", "500.0", "2000.0", "0.25"]])
        # A short text is repeated, and both sides generate as many tokens.
        # Each prompt begins elsewhere, or the pipeline would still have its first blocks.
        given = [line for line in done.stderr.splitlines() if line.startswith("ids ")]
        self.assertEqual(given, ["ids 7 [98, 99, 97] 9 9", "ids 1000 [99, 97, 98] 9 9",
                                 "ids 7 [97, 98, 99] 9 9", "ids 1000 [98, 99, 97] 9 9"])

    def test_what_cannot_be_measured_is_one_sentence(self):
        done = self.run_tool(model="bad.gguf")
        self.assertEqual(done.returncode, 2)
        self.assertIn("OpenVINO does not read bad.gguf: Check failed [load_gguf] no", done.stderr)
        self.assertEqual(self.run_tool(text="none.txt").returncode, 2)
        done = self.run_tool("--context", "7", decode=0)
        self.assertEqual(done.returncode, 2)
        self.assertIn("no decode speed of klt at 7 tokens", done.stderr)
        os.remove(os.path.join(self.folder.name, "openvino_genai.py"))
        self.write("openvino_genai.py", "raise ImportError('No module named openvino_genai')")
        done = self.run_tool()
        self.assertEqual(done.returncode, 2)
        self.assertIn("pip install openvino-genai", done.stderr)

    def test_impossible_numbers(self):
        for more in (("--context", "x"), ("--context", "0"), ("--rounds", "0"), ("--tokens", "1")):
            self.assertEqual(self.run_tool(*more).returncode, 2, more)


if __name__ == "__main__":
    unittest.main()
