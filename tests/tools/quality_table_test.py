"""tools/quality_table.py: the table that it makes of the program's JSON, and the commands that it runs."""
import contextlib
import importlib.util
import io
import json
import os
import stat
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location(
    "quality_table", os.path.join(HERE, "..", "..", "tools", "quality_table.py"))
quality_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quality_table)


def row(kv, kl, pages, kept=1.0, best=1.0, size=1000.0):
    return {"kv": kv, "kl_mean": kl, "compression_pages": pages, "mass_kept": kept, "mass_best": best,
            "bytes_per_token": size}


# Stands for the program: prints one row whose KL is the number of its arguments.
FAKE = """#!/bin/sh
[ "$1" = eval ] || exit 9
case "$*" in *bad.txt*) exit 3;; esac
echo "[{\\"kv\\":\\"klt\\",\\"kl_mean\\":0.00$#,\\"compression_pages\\":6,\\"mass_kept\\":1,\\"mass_best\\":1,\\"bytes_per_token\\":5}]"
"""


class QualityTable(unittest.TestCase):
    def test_columns_are_named_by_model_and_text(self):
        self.assertEqual(quality_table.column_name("m/SmolLM2-135M.Q4_1.gguf", "t/prose.txt"), "SmolLM2 prose")
        self.assertEqual(quality_table.column_name("Qwen2.5-Coder.gguf", "code"), "Qwen2 code")

    def test_cells_show_mass_where_tokens_are_left_out(self):
        self.assertEqual(quality_table.cell(row("klt", 0.01234, 6.1)), "0.0123")
        self.assertEqual(quality_table.cell(row("klt", 0.01234, 6.1, 0.96, 0.9701)), "0.0123, 0.960 / 0.970")

    def test_table(self):
        text = quality_table.table([("A prose", [row("klt", 0.01, 6.2), row("sals-25", 0.1, 3.5)]),
                                    ("B prose", [row("klt", 0.02, 6.1, size=2000.0), row("sals-25", 0.2, 3.6)])])
        lines = text.split("\n")
        self.assertEqual(lines[0], "| | A prose | B prose | pages | bytes a token |")
        self.assertEqual(lines[1], "|---|---|---|---|---|")
        self.assertEqual(lines[2], "| `klt` | 0.0100 | 0.0200 | 6.10x | 1,000 / 2,000 |")
        self.assertEqual(lines[3], "| `sals-25` | 0.1000 | 0.2000 | 3.50x | 1,000 |")
        with self.assertRaises(ValueError):
            quality_table.table([("A", [row("klt", 1, 1)]), ("B", [row("sals-25", 1, 1)])])

    def test_every_model_meets_every_text(self):
        with tempfile.TemporaryDirectory() as folder:
            program = os.path.join(folder, "narrows")
            with open(program, "w", encoding="utf-8") as file:
                file.write(FAKE)
            os.chmod(program, stat.S_IRWXU)
            common = ["--narrows", program, "-m", "A-1.gguf", "-m", "B-1.gguf", "-f", "x.txt", "--kv", "klt"]
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                code = quality_table.main([*common, "-f", "y.txt", "--json-dir", folder, "--", "--context", "9"])
                self.assertEqual(quality_table.main([*common, "-f", "bad.txt"]), 3)
            self.assertEqual(code, 0)
            self.assertIn("| | A x | A y | B x | B y |", out.getvalue())
            # eval -m M -f T --json --context 9 --kv klt: ten arguments
            self.assertIn("| `klt` | 0.0010 | 0.0010 | 0.0010 | 0.0010 | 6.00x | 5 |", out.getvalue())
            self.assertTrue(os.path.exists(os.path.join(folder, "B_y.json")))

    def test_what_is_there_is_not_run_again(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "A_x.json"), "w", encoding="utf-8") as file:
                json.dump([row("sals-25", 0.5, 3.5), row("klt", 0.25, 6)], file)
            with open(os.path.join(folder, "A_y.json"), "w", encoding="utf-8") as file:
                file.write("[{")  # a run that was cut
            program = os.path.join(folder, "narrows")
            with open(program, "w", encoding="utf-8") as file:
                file.write(FAKE)
            os.chmod(program, stat.S_IRWXU)
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as log:
                code = quality_table.main(["--narrows", program, "-m", "A-1.gguf", "-f", "x.txt", "-f", "y.txt", "--kv",
                                           "klt", "--json-dir", folder, "--resume"])
            self.assertEqual(code, 0)
            self.assertEqual(log.getvalue(), "A y ..\n")
            self.assertIn("| `klt` | 0.2500 | 0.0080 |", out.getvalue())
            self.assertIsNone(quality_table.stored(os.path.join(folder, "A_x.json"), ["klt", "f16"]))


if __name__ == "__main__":
    unittest.main()
