#!/usr/bin/env python3
"""Draws what `narrows --json` measured. Needs matplotlib (Debian: python3-matplotlib); nothing else of the project does.

  tools/plot.py frontier  EVAL.json...      -o frontier.svg    KL against bytes a token, a curve a family of profiles
  tools/plot.py needle    NEEDLE.json...    -o needle.png      share of facts found, context x depth, a panel a profile
  tools/plot.py spectrum  INSPECT.json      -o spectrum.png    how the keys' variance falls, layer by layer
  tools/plot.py speed     BENCH.json...     -o speed.png       tokens a second against context, a curve an engine and cache
  tools/plot.py precision PRECISION.json... -o precision.png   range of q.k by layer and head, RMSE of every kernel

Several files of one kind are drawn together. `LABEL=FILE` names a file in the picture where that matters (frontier,
needle, spectrum: a row of panels each).
"""
import argparse
import json
import re
import sys
from collections import defaultdict

# One colour a family of profiles and one marker a colour, so that a picture reads the same in grey.
FAMILIES = {
    "klt": ("#0b6e4f", "o"),
    "klt, several layers": ("#7a1fa2", "*"),
    "kivi": ("#c8553d", "s"),
    "sals": ("#3c6e9f", "^"),
    "f16": ("#444444", "D"),
    "llama.cpp": ("#b8860b", "v"),
}
OTHER = ("#777777", "x")


# ---------------------------------------------------------------- reading


class BadInput(Exception):
    """One sentence for the user."""


def family(profile):
    """The family of a profile's name: `klt-10x:budget=all` -> `klt`."""
    if profile.startswith("llama.cpp"):
        return "llama.cpp"
    name = re.split(r"[-:]", profile)[0]
    layers = re.search(r"[:,]layers=(\d+)", profile)
    if layers and int(layers.group(1)) > 1:
        return f"{name}, several layers"
    return name


def read(argument, needed):
    """`[LABEL=]FILE` -> (label, document). A list's rows must have the keys in `needed`."""
    label, _, path = argument.rpartition("=")
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {error}") from error
    rows = document if isinstance(document, list) else [document]
    if not rows:
        raise BadInput(f"{path}: holds no rows")
    for row in rows:
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise BadInput(f"{path}: a row has no \"{missing[0]}\"; is it the JSON of the right command?")
    return label, document


def frontier_points(rows):
    """{family: [(bytes a token, KL, profile)]}, by bytes. Rows that have no pages (f16, llama.cpp) are left out."""
    points = defaultdict(list)
    for row in rows:
        if row["bytes_per_token"] > 0 and row["kl_mean"] > 0:
            points[family(row["kv"])].append((row["bytes_per_token"], row["kl_mean"], row["kv"]))
    return {name: sorted(points[name]) for name in sorted(points)}


def pareto(points):
    """Those of a family's points that no other of it beats in both bytes and KL."""
    best, kept = float("inf"), []
    for point in sorted(points):
        if point[1] < best:
            best = point[1]
            kept.append(point)
    return kept


def needle_grids(rows):
    """[(profile, contexts, depths, share[depth][context] or None, found, tried)], in the order of the rows. Rows of one
    place add up."""
    tally = defaultdict(lambda: [0, 0])
    order = []
    for row in rows:
        if row["kv"] not in order:
            order.append(row["kv"])
        cell = tally[row["kv"], row["context"], row["depth"]]
        trials = row.get("trials", 1)
        cell[0] += row["correct"] * trials
        cell[1] += trials
    grids = []
    for profile in order:
        contexts = sorted({c for p, c, _ in tally if p == profile})
        depths = sorted({d for p, _, d in tally if p == profile})
        share = []
        for depth in depths:
            cells = [tally.get((profile, context, depth)) for context in contexts]
            share.append([cell[0] / cell[1] if cell and cell[1] else None for cell in cells])
        found = sum(cell[0] for key, cell in tally.items() if key[0] == profile)
        tried = sum(cell[1] for key, cell in tally.items() if key[0] == profile)
        grids.append((profile, contexts, depths, share, found, tried))
    return grids


def wilson(found, tried):
    """95% confidence interval of a share (Wilson 1927), as src/eval/needle.h has it."""
    z = 1.959963984540054
    p = found / tried
    middle = (p + z * z / (2 * tried)) / (1 + z * z / tried)
    reach = z / (1 + z * z / tried) * (p * (1 - p) / tried + z * z / (4 * tried * tried)) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)


def speed_curves(rows):
    """{(engine, kv): [(context, median, lowest, highest)]}, by context."""
    curves = defaultdict(list)
    for row in rows:
        median = row["decode_tok_s"]
        curves[row["engine"], row["kv"]].append(
            (row["context"], median, row.get("decode_tok_s_min", median), row.get("decode_tok_s_max", median)))
    return {key: sorted(points) for key, points in curves.items()}


def precision_ranges(rows):
    """[(layer, head, largest |q.k| before, after shifting)], by the first; one a layer and head."""
    ranges = {}
    for row in rows:
        if row.get("layer") is not None and row.get("qk_max") is not None:
            at = (row["layer"], row["head"])
            before, after = ranges.get(at, (0, None))
            shifted = row.get("qk_max_shifted")
            if shifted is not None:
                after = shifted if after is None else max(after, shifted)
            ranges[at] = (max(before, row["qk_max"]), after)
    return sorted((layer, head, before, after) for (layer, head), (before, after) in ranges.items())


def precision_bars(rows):
    """(cases, kernels, {(case, kernel): (rmse or None, nan_rows)}) in the order of the rows."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    return cases, kernels, {(row["case"], row["kernel"]): (row["rmse"], row["nan_rows"]) for row in rows}


# ---------------------------------------------------------------- drawing


def pyplot():
    """Imported late: reading and --help need no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
        "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
        "legend.frameon": False, "figure.constrained_layout.use": True, "svg.hashsalt": "narrows",
        "svg.fonttype": "none",
    })
    return plt


def whole(x):
    return f"{x:,.0f}"


def panels(plt, n, width, height, columns=None):
    columns = columns or min(n, 4)
    rows = -(-n // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[n:]:
        axis.set_visible(False)
    return figure, flat[:n]


def short(profile):
    """What a label need not repeat: the family's default name stays, settings lose their keys' glue."""
    return profile.replace(":", " ").replace("budget=all", "all").replace(",", " ")


def draw_frontier(documents):
    plt = pyplot()
    figure, axes = panels(plt, len(documents), 4.6, 3.9)
    for axis, (label, rows) in zip(axes, documents):
        points = frontier_points(rows)
        if not points:
            raise BadInput("no row has encoded pages: nothing to draw a frontier of")
        f16 = max(row["bytes_per_token_f16"] for row in rows)
        for name, of_family in points.items():
            colour, marker = FAMILIES.get(name, OTHER)
            axis.scatter([p[0] for p in of_family], [p[1] for p in of_family], color=colour, marker=marker, s=26,
                         zorder=3)
            front = pareto(of_family)
            axis.plot([p[0] for p in front], [p[1] for p in front], color=colour, label=name, linewidth=1.6)
            for x, y, profile in of_family:
                axis.annotate(short(profile), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6.5,
                              color=colour)
        axis.set(xscale="log", yscale="log", xlabel="bytes a token, all layers (windows apart)",
                 ylabel="mean KL to an exact cache (nats)", title=label)
        axis.margins(x=0.16, y=0.1)
        low, high = axis.get_xlim()
        ticks = [f16 / r for r in (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32) if low < f16 / r < high]
        axis.set_xticks(ticks, [whole(t) for t in ticks])
        axis.minorticks_off()
        top = axis.secondary_xaxis("top", functions=(lambda x: x, lambda x: x))
        top.set_xticks(ticks, [f"{f16 / t:.0f}x" for t in ticks])
        top.set_xlabel(f"times smaller than f16 ({whole(f16)} bytes)", fontsize=8)
        top.minorticks_off()
        axis.legend(loc="lower left", fontsize=8)
    return figure


def draw_needle(documents):
    plt = pyplot()
    grids = [(label, grid) for label, rows in documents for grid in needle_grids(rows)]
    figure, axes = panels(plt, len(grids), 2.5, 2.6)
    image = None
    for axis, (label, (profile, contexts, depths, share, found, tried)) in zip(axes, grids):
        values = [[float("nan") if cell is None else cell for cell in line] for line in share]
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
        axis.grid(False)
        axis.set_xticks(range(len(contexts)), [whole(c) for c in contexts])
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}%" for d in depths])
        for y, line in enumerate(share):
            for x, cell in enumerate(line):
                if cell is not None:
                    axis.text(x, y, f"{100 * cell:.0f}", ha="center", va="center", fontsize=7,
                              color="black" if cell > 0.6 else "white")
        low, high = wilson(found, tried)
        axis.set_title(f"{label + ' ' if label else ''}{profile}\n{found:.0f} of {tried} found ({100 * low:.0f} - "
                       f"{100 * high:.0f}%)", fontsize=8.5)
        axis.set_xlabel("context (tokens)")
    axes[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=axes, label="share found", shrink=0.85)
    return figure


def draw_spectrum(documents):
    plt = pyplot()
    figure, axes = panels(plt, len(documents), 5.2, 3.6)
    for axis, (label, document) in zip(axes, documents):
        rows = document["key_spectrum"]
        if not rows:
            raise BadInput("the spectrum is empty: run `narrows inspect` with -f")
        layers = [row["layer"] for row in rows]
        for key, text, colour in (("share_8th", "1/8", "#0b6e4f"), ("share_4th", "1/4", "#3c6e9f"),
                                  ("share_half", "1/2", "#c8553d")):
            axis.plot(layers, [row[key] for row in rows], marker="o", markersize=3.5, color=colour,
                      label=f"strongest {text} of the coordinates")
        axis.set(ylim=(0, 1.02), xlabel="layer", ylabel="share of the keys' variance",
                 title=label or document["model"]["name"])
        other = axis.twinx()
        other.bar(layers, [row["mean_over_sd"] for row in rows], color="#bbbbbb", alpha=0.5, width=0.7)
        other.set_ylabel("|mean key| / standard deviation", color="#888888")
        other.grid(False)
        other.spines["right"].set_visible(True)
        axis.set_zorder(other.get_zorder() + 1)
        axis.patch.set_visible(False)
        axis.legend(loc="lower right", fontsize=8)
    return figure


def draw_speed(rows):
    plt = pyplot()
    figure, axes = panels(plt, 1, 6.2, 3.9)
    axis = axes[0]
    seen = defaultdict(int)
    contexts = sorted({row["context"] for row in rows})
    for (engine, kv), points in speed_curves(rows).items():
        peer = engine != "narrows"
        name = family(engine if peer else kv)
        colour, marker = FAMILIES.get(name, OTHER)
        style = ["-", "--", ":", "-."][seen[name] % 4]
        seen[name] += 1
        x, median = [p[0] for p in points], [p[1] for p in points]
        axis.plot(x, median, color=colour, marker=marker, markersize=5, linestyle=style,
                  label=f"{engine} {kv}" if peer else kv, linewidth=1.6)
        axis.fill_between(x, [p[2] for p in points], [p[3] for p in points], color=colour, alpha=0.12, linewidth=0)
    axis.set(xlabel="tokens in the cache", ylabel="decoded tokens a second", ylim=(0, None))
    axis.set_xticks(contexts, [whole(c) for c in contexts])
    axis.legend(fontsize=8)
    return figure


def draw_precision(rows):
    plt = pyplot()
    ranges = precision_ranges(rows)
    cases, kernels, bars = precision_bars(rows)
    n = 2 if ranges else 1
    figure, axes = plt.subplots(n, 1, figsize=(max(7.5, 0.28 * len(cases) * len(kernels)), 3.4 * n), squeeze=False)
    axes = list(axes.flat)
    if ranges:
        axis = axes.pop(0)
        x = range(len(ranges))
        axis.vlines(x, [after if after is not None else before for _, _, before, after in ranges],
                    [before for _, _, before, _ in ranges], color="#bbbbbb", zorder=2)
        axis.scatter(x, [r[2] for r in ranges], color="#c8553d", s=18, zorder=3, label="as computed")
        shifted = [(i, r[3]) for i, r in enumerate(ranges) if r[3] is not None]
        axis.scatter([i for i, _ in shifted], [y for _, y in shifted], color="#0b6e4f", marker="v", s=18, zorder=3,
                     label="after the shift")
        axis.axhline(65504, color="#444444", linestyle="--", linewidth=1)
        axis.text(0, 65504 * 1.15, "largest number of fp16", fontsize=7.5, color="#444444")
        step = max(1, len(ranges) // 24)
        axis.set_xticks(list(x)[::step], [f"{r[0]}.{r[1]}" for r in ranges][::step], fontsize=7)
        axis.set(yscale="log", xlabel="layer.head", ylabel="largest |q.k| of a head")
        axis.legend(fontsize=8)
    axis = axes[0]
    width = 0.8 / len(kernels)
    palette = plt.get_cmap("tab10")
    finite = [value[0] for value in bars.values() if value[0]]
    floor = min(finite) / 3 if finite else 1e-6
    for k, kernel in enumerate(kernels):
        heights = [bars.get((case, kernel), (None, 0)) for case in cases]
        x = [i + (k - (len(kernels) - 1) / 2) * width for i in range(len(cases))]
        axis.bar(x, [h[0] or 0 for h in heights], width=width * 0.92, color=palette(k % 10), label=kernel)
        for at, (rmse, nan_rows) in zip(x, heights):
            if nan_rows:
                axis.text(at, floor * 1.15, f"NaN in {nan_rows} rows", rotation=90, ha="center", va="bottom",
                          fontsize=6.5, color=palette(k % 10))
    axis.set(yscale="log", ylabel="relative RMSE of the output")
    axis.set_ylim(bottom=floor)
    axis.set_xticks(range(len(cases)), cases, rotation=20 if len(cases) > 4 else 0,
                    ha="right" if len(cases) > 4 else "center")
    axis.legend(fontsize=8, ncols=2)
    return figure


KINDS = {
    "frontier": (draw_frontier, ("kv", "kl_mean", "bytes_per_token", "bytes_per_token_f16"), False),
    "needle": (draw_needle, ("kv", "context", "depth", "correct"), False),
    "spectrum": (draw_spectrum, ("key_spectrum", "model"), False),
    "speed": (draw_speed, ("engine", "kv", "context", "decode_tok_s"), True),
    "precision": (draw_precision, ("case", "kernel", "rmse", "nan_rows"), True),
}


def draw(kind, arguments):
    """The figure of `[LABEL=]FILE` arguments."""
    function, needed, joined = KINDS[kind]
    documents = [read(argument, needed) for argument in arguments]
    if joined:
        return function([row for _, rows in documents for row in rows])
    if kind in ("frontier", "needle"):
        by_label = defaultdict(list)  # files of one label are parts of one run
        for label, rows in documents:
            by_label[label] += rows
        documents = list(by_label.items())
    return function(documents)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("files", nargs="+", metavar="[LABEL=]FILE")
    parser.add_argument("-o", "--output", required=True, metavar="PICTURE", help="ending in .png, .svg or .pdf")
    parser.add_argument("--title", help="above the whole picture")
    parser.add_argument("--dpi", type=int, default=150, help="of a PNG (default 150)")
    flags = parser.parse_args(arguments)
    try:
        figure = draw(flags.kind, flags.files)
    except BadInput as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"plot: {error.name} is missing; install python3-matplotlib (Debian) or matplotlib (PyPI)",
              file=sys.stderr)
        return 1
    if flags.title:
        figure.suptitle(flags.title)
    # No date in the file: the same numbers make the same picture.
    metadata = {"Date": None} if flags.output.endswith(".svg") else None
    try:
        figure.savefig(flags.output, dpi=flags.dpi, metadata=metadata)
    except (OSError, ValueError) as error:
        print(f"plot: {flags.output}: {error}", file=sys.stderr)
        return 2
    finally:
        pyplot().close(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
