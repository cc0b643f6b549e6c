#!/usr/bin/env python3
"""Cache profiles against an exact cache, models times texts in one table (Markdown), out of `narrows eval --json`.

  tools/quality_table.py -m A.gguf -m B.gguf -f prose.txt -f code.txt
  tools/quality_table.py -m A.gguf -f prose.txt --kv klt --kv kivi-2 --json-dir out -- --context 2048 --weights f32

Options after `--` go to every `narrows eval`. With --resume, runs whose JSON is in --json-dir already are not run again:
what was interrupted goes on, if model, text and options are the same, which is yours to see to. A cell is mean KL in nats; where a profile leaves tokens out, the share of
the attention that it kept and what the best choice of as many tokens would have kept follow. `pages` is how much smaller
than f16 the encoded pages are, as allocated: the least over the runs.
"""
import argparse
import json
import os
import subprocess
import sys

PROFILES = ["klt:k=2,v=3,budget=all", "klt", "klt-10x:budget=all", "klt-10x", "sals-25:budget=all", "sals-25"]


def column_name(model, text):
    """`SmolLM2-135M-Instruct.Q4_1.gguf`, `texts/prose.txt` -> `SmolLM2 prose`."""
    return f"{os.path.basename(model).split('-')[0].split('.')[0]} {os.path.splitext(os.path.basename(text))[0]}"


def cell(row):
    """A row of eval's JSON as text."""
    text = f"{row['kl_mean']:.4f}"
    if row["mass_best"] < 1:
        text += f", {row['mass_kept']:.3f} / {row['mass_best']:.3f}"
    return text


def stored(path, profiles):
    """Rows of an earlier run's JSON for these profiles; None if there is none that has them all."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = {row["kv"]: row for row in json.load(file)}
    except (OSError, ValueError):
        return None
    return [rows[profile] for profile in profiles] if all(profile in rows for profile in profiles) else None


def table(columns):
    """columns: [(name, rows of one eval)], all of the same profiles in one order."""
    profiles = [row["kv"] for row in columns[0][1]]
    lines = ["| | " + " | ".join(name for name, _ in columns) + " | pages | bytes a token |",
             "|---" * (len(columns) + 3) + "|"]
    for i, profile in enumerate(profiles):
        rows = [rows[i] for _, rows in columns]
        if any(row["kv"] != profile for row in rows):
            raise ValueError("the runs are of different profiles")
        pages = min(row["compression_pages"] for row in rows)
        sizes = list(dict.fromkeys(f"{row['bytes_per_token']:,.0f}" for row in rows))
        lines.append(f"| `{profile}` | " + " | ".join(cell(row) for row in rows) + f" | {pages:.2f}x | "
                     + " / ".join(sizes) + " |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", action="append", required=True, metavar="FILE")
    parser.add_argument("-f", "--file", action="append", required=True, metavar="TEXT")
    parser.add_argument("--kv", action="append", metavar="PROFILE", help="default: " + " ".join(PROFILES))
    parser.add_argument("--narrows", default="build/narrows", metavar="PROGRAM")
    parser.add_argument("--json-dir", metavar="FOLDER", help="keep each run's JSON there, for tools/plot.py")
    parser.add_argument("--resume", action="store_true", help="run only what --json-dir does not have")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="for every eval")
    flags = parser.parse_args(arguments)
    profiles = flags.kv or PROFILES
    if flags.resume and not flags.json_dir:
        parser.error("--resume needs --json-dir")
    columns = []
    for model in flags.model:
        for text in flags.file:
            name = column_name(model, text)
            path = os.path.join(flags.json_dir, name.replace(" ", "_") + ".json") if flags.json_dir else None
            rows = stored(path, profiles) if flags.resume else None
            if rows is None:
                print(f"{name} ..", file=sys.stderr)
                command = [flags.narrows, "eval", "-m", model, "-f", text, "--json", *flags.options]
                for profile in profiles:
                    command += ["--kv", profile]
                run = subprocess.run(command, stdout=subprocess.PIPE, check=False)
                if run.returncode != 0:
                    return run.returncode
                if path:
                    os.makedirs(flags.json_dir, exist_ok=True)
                    with open(path, "wb") as file:
                        file.write(run.stdout)
                rows = json.loads(run.stdout)
            columns.append((name, rows))
    print(table(columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
