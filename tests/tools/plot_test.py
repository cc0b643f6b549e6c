"""tools/plot.py: the numbers that it reads out of the program's JSON, and those that stand in the figures.

Reading is tested everywhere; drawing where matplotlib is installed (without it those cases are skipped, by name)."""
import contextlib
import importlib.util
import io
import json
import os
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location("plot", os.path.join(HERE, "..", "..", "tools", "plot.py"))
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)

needs_matplotlib = unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is not installed")


def eval_row(kv, size, kl):
    return {"kv": kv, "kl_mean": kl, "bytes_per_token": size, "bytes_per_token_f16": 23040}


EVAL = [eval_row("f16", 23040, 0.0), eval_row("klt", 3750, 0.012), eval_row("klt-10x", 2280, 0.036),
        eval_row("klt:k=3,v=3", 5000, 0.013), eval_row("kivi-2", 4320, 0.142), eval_row("kivi-4", 7200, 0.0055),
        eval_row("klt:layers=8", 1600, 0.005), eval_row("llama.cpp f16 flash", 0, 0.004)]
NEEDLE = [{"kv": kv, "context": c, "depth": d, "correct": share, "trials": 4}
          for kv, table in (("f16", [[1, 0.75], [0.5, 1]]), ("kivi-2", [[0, 0.25], [1, 0]]))
          for d, line in zip((0, 1), table) for c, share in zip((2048, 4096), line)]
INSPECT = {"model": {"name": "a model"}, "key_spectrum": [
    {"layer": i, "share_8th": 0.25 + i / 8, "share_4th": 0.5 + i / 8, "share_half": 0.625 + i / 8,
     "mean_over_sd": 3.0 - i} for i in range(3)]}
BENCH = [{"engine": engine, "kv": kv, "context": c, "decode_tok_s": speed, "decode_tok_s_min": speed - 2,
          "decode_tok_s_max": speed + 1}
         for engine, kv, line in (("narrows", "f16", (150, 61)), ("narrows", "klt", (133, 80)),
                                  ("llama.cpp", "f16", (141, 27.6)))
         for c, speed in zip((7600, 0), reversed(line))]
PRECISION = [{"case": case, "kernel": kernel, "rmse": rmse, "nan_rows": nan, "layer": layer, "head": head, "qk_max": top,
              "qk_max_shifted": low}
             for case, layer, head, top, low, errors in (
                 ("layer 4 head 8", 4, 8, 115767, 837, ((None, 7), (2e-2, 0), (8e-4, 0))),
                 ("layer 0 head 1", 0, 1, 120, 80, ((3e-4, 0), (3e-4, 0), (2e-4, 0))))
             for kernel, (rmse, nan) in zip(("fp16", "pasa", "fp16-shift"), errors)]


class Files(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def file(self, name, document):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as f:
            f.write(document if isinstance(document, str) else json.dumps(document))
        return path

    def run_plot(self, *arguments):
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = plot.main(list(arguments))
        return code, errors.getvalue()


class Reading(Files):
    def test_families(self):
        self.assertEqual(plot.family("klt-10x:budget=all"), "klt")
        self.assertEqual(plot.family("klt:k=1,layers=8"), "klt, several layers")
        self.assertEqual(plot.family("klt:layers=1"), "klt")
        self.assertEqual(plot.family("sals-12.5"), "sals")
        self.assertEqual(plot.family("llama.cpp f16 flash"), "llama.cpp")

    def test_frontier_leaves_out_exact_rows_and_sorts(self):
        points = plot.frontier_points(EVAL)
        self.assertEqual(list(points), ["kivi", "klt", "klt, several layers"])
        self.assertEqual([p[0] for p in points["klt"]], [2280, 3750, 5000])
        # klt:k=3,v=3 is larger and no better than klt: it is drawn as a point, but the curve passes below it.
        self.assertEqual([p[2] for p in plot.pareto(points["klt"])], ["klt-10x", "klt"])
        self.assertEqual([p[2] for p in plot.pareto(points["kivi"])], ["kivi-2", "kivi-4"])

    def test_needle_cells_add_up_by_trials(self):
        more = [dict(NEEDLE[0], correct=0.5, trials=12)]
        grids = plot.needle_grids(NEEDLE + more)
        self.assertEqual([g[0] for g in grids], ["f16", "kivi-2"])
        _, contexts, depths, share, found, tried = grids[0]
        self.assertEqual((contexts, depths), ([2048, 4096], [0, 1]))
        self.assertEqual(share, [[(4 + 6) / 16, 0.75], [0.5, 1]])
        self.assertEqual((found, tried), (4 + 6 + 3 + 2 + 4, 28))
        self.assertIsNone(plot.needle_grids(NEEDLE[:3])[0][3][1][1])  # never tried: an empty cell

    def test_wilson_is_the_programs(self):
        low, high = plot.wilson(81, 263)
        self.assertAlmostEqual(low, 0.2553, 4)
        self.assertAlmostEqual(high, 0.3662, 4)

    def test_speed_by_context(self):
        curves = plot.speed_curves(BENCH)
        self.assertEqual(curves["narrows", "f16"], [(0, 150, 148, 151), (7600, 61, 59, 62)])
        self.assertEqual(len(curves), 3)

    def test_precision(self):
        self.assertEqual(plot.precision_ranges(PRECISION), [(0, 1, 120, 80), (4, 8, 115767, 837)])
        cases, kernels, bars = plot.precision_bars(PRECISION)
        self.assertEqual(cases, ["layer 4 head 8", "layer 0 head 1"])
        self.assertEqual(kernels, ["fp16", "pasa", "fp16-shift"])
        self.assertEqual(bars["layer 4 head 8", "fp16"], (None, 7))

    def test_refusals_are_one_sentence(self):
        output = os.path.join(self.folder, "x.png")
        for kind, document, words in (("frontier", "{", "x.json"), ("frontier", [], "no rows"),
                                      ("needle", EVAL, '"context"'), ("spectrum", {"a": 1}, '"key_spectrum"')):
            code, errors = self.run_plot(kind, self.file("x.json", document), "-o", output)
            self.assertEqual(code, 2)
            self.assertIn(words, errors)
            self.assertEqual(errors.count("\n"), 1)
            self.assertFalse(os.path.exists(output))
        code, errors = self.run_plot("frontier", os.path.join(self.folder, "none.json"), "-o", output)
        self.assertEqual(code, 2)
        self.assertIn("none.json", errors)


@needs_matplotlib
class Drawing(Files):
    def figure(self, kind, *documents):
        labels = [f"part {i}=" + self.file(f"{i}.json", d) for i, d in enumerate(documents)]
        figure = plot.draw(kind, labels)
        self.addCleanup(plot.pyplot().close, figure)
        return figure

    def test_frontier(self):
        axes = [a for a in self.figure("frontier", EVAL, EVAL[1:3]).axes if a.get_title()]
        self.assertEqual([a.get_title() for a in axes], ["part 0", "part 1"])
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes[0].lines}
        self.assertEqual(lines, {"kivi": [[4320, 0.142], [7200, 0.0055]], "klt": [[2280, 0.036], [3750, 0.012]],
                                 "klt, several layers": [[1600, 0.005]]})
        dots = sorted(dot for c in axes[0].collections for dot in c.get_offsets().tolist())
        self.assertIn([5000, 0.013], dots)
        self.assertEqual(len(dots), 6)
        self.assertEqual({t.get_text() for t in axes[1].texts}, {"klt", "klt-10x"})

    def test_needle(self):
        axes = [a for a in self.figure("needle", NEEDLE).axes if a.images]
        self.assertEqual(axes[0].images[0].get_array().tolist(), [[1, 0.75], [0.5, 1]])
        self.assertEqual(axes[1].images[0].get_array().tolist(), [[0, 0.25], [1, 0]])
        self.assertEqual([t.get_text() for t in axes[1].texts], ["0", "25", "100", "0"])
        self.assertIn("13 of 16", axes[0].get_title())
        self.assertEqual([t.get_text() for t in axes[0].get_xticklabels()], ["2,048", "4,096"])

    def test_spectrum(self):
        axis, other = self.figure("spectrum", INSPECT).axes
        drawn = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
        self.assertEqual(drawn["strongest 1/8 of the coordinates"], [0.25, 0.375, 0.5])
        self.assertEqual([bar.get_height() for bar in other.patches], [3, 2, 1])

    def test_speed(self):
        axis = self.figure("speed", BENCH[:2], BENCH[2:]).axes[0]
        drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        self.assertEqual(drawn, {"f16": [[0, 150], [7600, 61]], "klt": [[0, 133], [7600, 80]],
                                 "llama.cpp f16": [[0, 141], [7600, 27.6]]})

    def test_precision(self):
        top, bars = self.figure("precision", PRECISION).axes
        dots = [c.get_offsets().tolist() for c in top.collections if len(c.get_offsets())]
        self.assertIn([[0, 120], [1, 115767]], dots)
        self.assertIn([[0, 80], [1, 837]], dots)
        self.assertIn(65504, [line.get_ydata()[0] for line in top.lines])
        self.assertEqual([p.get_height() for p in bars.patches], [0, 3e-4, 2e-2, 3e-4, 8e-4, 2e-4])
        self.assertEqual([t.get_text() for t in bars.texts], ["NaN in 7 rows"])

    def test_files(self):
        for kind, document in (("frontier", EVAL), ("needle", NEEDLE), ("spectrum", INSPECT), ("speed", BENCH),
                               ("precision", PRECISION)):
            source = self.file("in.json", document)
            for ending, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
                output = os.path.join(self.folder, kind + ending)
                self.assertEqual(self.run_plot(kind, source, "-o", output), (0, ""))
                with open(output, "rb") as f:
                    first = f.read()
                self.assertTrue(first.startswith(begin))
                self.assertEqual(self.run_plot(kind, source, "-o", output), (0, ""))
                with open(output, "rb") as f:
                    self.assertEqual(f.read(), first)  # the same numbers, the same picture
        code, errors = self.run_plot("speed", self.file("b.json", BENCH), "-o", os.path.join(self.folder, "no", "x.png"))
        self.assertEqual(code, 2)
        self.assertEqual(errors.count("\n"), 1)


if __name__ == "__main__":
    unittest.main()
