#!/usr/bin/env python3
"""narrows beside OpenVINO GenAI on the same GGUF file, in turn.

  python3 -m venv ov && ov/bin/pip install openvino-genai==2026.4.1.0
  ov/bin/python tools/bench_openvino.py build/narrows -m MODEL.gguf -f TEXT [--context 512,4096] [--kv klt] [--rounds 3] [--tokens 32]

Each round runs `narrows bench` once and then lets OpenVINO read as many tokens of the same text and generate greedily. Both use all cores
and their own defaults (OpenVINO: an 8-bit cache). Prompt: tokens / time to the first token; decoding: 1 / mean time of the further
tokens; medians over the rounds, and the median of the ratios round by round. OpenVINO does not read every GGUF file (2026.4: not
the 5-bit types, so not the Q4_K_M file of Qwen): then it says so. Exit codes: 0 measured, 2 something cannot be read or run.
"""
import argparse
import statistics
import sys

from bench_guard import CannotMeasure, run_bench


class OpenVino:
    """The model in OpenVINO's pipeline, and the text as its tokens."""

    def __init__(self, model, text):
        try:
            import numpy
            import openvino
            import openvino_genai
        except ImportError as error:
            raise CannotMeasure(f"{error}; `pip install openvino-genai` into the Python that runs this") from error
        self.openvino, self.genai, self.numpy = openvino, openvino_genai, numpy
        try:
            self.pipeline = openvino_genai.LLMPipeline(model, "CPU")
        except RuntimeError as error:
            raise CannotMeasure(f"OpenVINO does not read {model}: {' '.join(str(error).split())}") from error
        self.ids = numpy.array(self.pipeline.get_tokenizer().encode(text).input_ids.data)[0]
        if len(self.ids) == 0:
            raise CannotMeasure("the text has no tokens")
        self.prompts = 0

    def measure(self, context, tokens):
        """(prompt, decoding) in tokens a second."""
        # Every prompt begins elsewhere in the text: the pipeline keeps the blocks of earlier prompts and would not read them again.
        self.prompts += 1
        repeated = self.numpy.resize(self.numpy.roll(self.ids, -97 * self.prompts), context)[None]
        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        metrics = self.pipeline.generate(self.openvino.Tensor(self.numpy.ascontiguousarray(repeated)), config).perf_metrics
        return 1000 * context / metrics.get_ttft().mean, 1000 / metrics.get_tpot().mean


def compare(narrows, peer, arguments, contexts, kv, rounds, tokens, note):
    """{(context, what): list of (ours, theirs)}, what: prefill or decode."""
    speeds = {}
    for round_ in range(rounds):
        for context in contexts:
            note(f"round {round_ + 1} of {rounds}, {context} tokens")
            ours = run_bench(narrows, [*arguments, "--context", str(context), "--kv", kv, "--rounds", "1", "--tokens", str(tokens)])
            for what, theirs in zip(("prefill", "decode"), peer.measure(context, tokens)):
                if (kv, context, f"{what}_tok_s") not in ours:
                    raise CannotMeasure(f"narrows bench printed no {what} speed of {kv} at {context} tokens")
                speeds.setdefault((context, what), []).append((ours[(kv, context, f"{what}_tok_s")], theirs))
    return speeds


def report(speeds):
    lines = [f"{'context':>8} {'what':<8}{'narrows tok/s':>14}{'OpenVINO tok/s':>15}{'ratio':>7}"]
    for (context, what), pairs in sorted(speeds.items()):
        ours, theirs = (statistics.median(x) for x in zip(*pairs))
        ratio = statistics.median(a / b for a, b in pairs)
        lines.append(f"{context:>8} {what:<8}{ours:>14.1f}{theirs:>15.1f}{ratio:>7.2f}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="narrows beside OpenVINO GenAI on the same GGUF file.")
    parser.add_argument("narrows")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-f", "--file", required=True)
    parser.add_argument("--context", default="512,4096")
    parser.add_argument("--kv", default="klt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args(argv)
    try:
        contexts = [int(x) for x in options.context.split(",")]
    except ValueError:
        parser.error(f"--context: {options.context} is no list of whole numbers")
    if min(contexts + [options.rounds, options.tokens - 1]) < 1:
        parser.error("--context and --rounds must be at least 1, --tokens at least 2")
    try:
        with open(options.file, encoding="utf-8") as file:
            peer = OpenVino(options.model, file.read())
        arguments = ["-m", options.model, "-f", options.file]
        note = lambda line: print(line, file=sys.stderr)
        print(report(compare(options.narrows, peer, arguments, contexts, options.kv, options.rounds, options.tokens, note)))
    except (CannotMeasure, OSError, UnicodeDecodeError) as error:
        print(f"bench_openvino.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
