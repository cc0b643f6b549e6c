#!/usr/bin/env python3
"""Is NEW slower than OLD? Runs `narrows bench` of two binaries in turn and compares what they reach.

  tools/bench_guard.py OLD NEW -m MODEL.gguf [--context 0,4096] [--kv f16,klt] [--runs 5] [-- MORE BENCH OPTIONS]

For every profile and depth, prefill and decode apart, a binary has one speed a run, and the runs give a range. NEW
fails only where its range lies wholly below OLD's: a shared machine drifts by more than most changes are worth, and the two
binaries drift together. Exit codes: 0 not slower, 1 slower somewhere, 2 the command line or a binary is at fault.
"""
import argparse
import json
import statistics
import subprocess
import sys

METRICS = ("prefill_tok_s", "decode_tok_s")


class CannotMeasure(Exception):
    """One sentence for the user."""


def run_bench(binary, arguments):
    """Speeds of one run: {(profile, context, metric): tokens a second}. Rows of other engines are left out."""
    command = [binary, "bench", *arguments, "--json"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rows = json.loads(done.stdout)
        speeds = {}
        for row in rows:
            if row["engine"] != "narrows":
                continue
            for metric in METRICS:
                if row[metric] > 0:  # 0: not measured, as prefill at depth 0
                    speeds[(row["kv"], row["context"], metric)] = row[metric]
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotMeasure(f"{' '.join(command)}: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CannotMeasure(f"{' '.join(command)}: its output is no list of bench rows ({error!r})") from error
    if not speeds:
        raise CannotMeasure(f"{' '.join(command)}: measured nothing")
    return speeds


def measure(old, new, arguments, runs, note):
    """A list of speeds for each key and binary: (of OLD, of NEW). Who goes first alternates."""
    speeds = ({}, {})
    for run in range(runs):
        for which in (0, 1) if run % 2 == 0 else (1, 0):
            note(f"run {run + 1} of {runs}: {'NEW' if which else 'OLD'}")
            for key, speed in run_bench((old, new)[which], arguments).items():
                speeds[which].setdefault(key, []).append(speed)
    if speeds[0].keys() != speeds[1].keys():
        raise CannotMeasure("the two binaries measured different profiles or depths: nothing to compare")
    return speeds


def verdict(old, new):
    """old, new: speeds of the runs."""
    if max(new) < min(old):
        return "slower"
    if min(new) > max(old):
        return "faster"
    return "same"


def report(old, new):
    """The table, and whether NEW is slower anywhere."""
    lines = [f"{'kv':<16}{'context':>8} {'what':<8}{'old tok/s':>24}{'new tok/s':>24}{'new / old':>11}  verdict"]
    slower = False
    for key in old:
        kv, context, metric = key
        ranges = [f"{statistics.median(x):.1f} ({min(x):.1f} - {max(x):.1f})" for x in (old[key], new[key])]
        ratio = statistics.median(new[key]) / statistics.median(old[key])
        said = verdict(old[key], new[key])
        slower = slower or said == "slower"
        lines.append(f"{kv:<16}{context:>8} {metric.split('_')[0]:<8}{ranges[0]:>24}{ranges[1]:>24}{ratio:>11.3f}  {said}")
    return "\n".join(lines), slower


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def main(argv):
    more = []
    if "--" in argv:
        at = argv.index("--")
        argv, more = argv[:at], argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", help="the narrows to compare with")
    parser.add_argument("new", metavar="NEW", help="the narrows that must not be slower")
    parser.add_argument("-m", "--model", required=True, help="GGUF model")
    parser.add_argument("--context", default="0", help="depths, e.g. 0,4096 (default 0)")
    parser.add_argument("--kv", default="f16,klt", help="profiles (default f16,klt)")
    parser.add_argument("--runs", type=positive, default=5, help="runs of each binary (default 5)")
    options = parser.parse_args(argv)
    arguments = ["-m", options.model, "--context", options.context, "--kv", options.kv, *more]
    try:
        old, new = measure(options.old, options.new, arguments, options.runs, lambda text: print(text, file=sys.stderr))
    except CannotMeasure as error:
        print(error, file=sys.stderr)
        return 2
    table, slower = report(old, new)
    print(table)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
