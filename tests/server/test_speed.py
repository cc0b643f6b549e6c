"""Figures that need an idle machine: NARROWS_SPEED=1 tools/server_tests.sh PROGRAM MODEL -s -k speed. They are printed, and held to the goals.
With NARROWS_TEXT=FILE the session is of 16,000 tokens, as a model with that context wants."""

import os
import threading
import time

import pytest

pytestmark = pytest.mark.skipif("NARROWS_SPEED" not in os.environ, reason="NARROWS_SPEED is not set: timings need an idle machine")


def tokens_a_second(server, n_stream, n_token=120):
    """Of all streams in sum, from the first token that all have to the last; no stream ends before."""
    counts = [0] * n_stream
    done = threading.Event()

    def read(i):
        for event in server.stream(f"Tell me a story about the number {i}.", max_tokens=2 * n_token, ignore_eos=True, logprobs=True):
            if event == "[DONE]" or done.is_set():
                return
            counts[i] += sum(len(c["logprobs"]["content"]) for c in event["choices"] if c["logprobs"])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(n_stream)]
    for t in threads:
        t.start()
    while min(counts) < 5:
        time.sleep(0.001)
    begin, before = time.monotonic(), sum(counts)
    while min(counts) < n_token:
        time.sleep(0.001)
    speed = (sum(counts) - before) / (time.monotonic() - begin)
    done.set()
    for t in threads:
        t.join()
    server.wait_until_idle(20)
    return speed


def test_speed_of_four_streams(start):
    server = start("--slots", "4")
    tokens_a_second(server, 1, 20)
    rounds = [(tokens_a_second(server, 1), tokens_a_second(server, 4)) for _ in range(3)]
    one, four = sorted(r[0] for r in rounds), sorted(r[1] for r in rounds)
    print(f"\none stream {one[1]:.1f} tok/s ({one[0]:.1f} to {one[2]:.1f}), four {four[1]:.1f} ({four[0]:.1f} to {four[2]:.1f}): "
          f"{four[1] / one[1]:.2f} times")
    assert four[1] >= 2 * one[1]


def test_speed_of_a_short_request_in_a_long_prefill(start, long_text):
    server = start("--slots", "2")
    prompt = long_text[:28000]

    def read(tag):
        reply = server.chat(tag + prompt, max_tokens=1, cache_prompt=False)
        return reply["narrows"]["prefill_s"], reply["usage"]["prompt_tokens"]

    alone, n_prompt = min(read("a") for _ in range(2))
    result = []
    thread = threading.Thread(target=lambda: result.extend(read("b")))
    thread.start()
    while not server.slots_busy():
        pass
    time.sleep(alone / 4)
    begin = time.monotonic()
    first = None
    for event in server.stream("Say hello.", max_tokens=16, ignore_eos=True):
        if first is None and event != "[DONE]" and event["choices"] and event["choices"][0]["delta"].get("content"):
            first = time.monotonic() - begin
    whole = time.monotonic() - begin
    thread.join()
    print(f"\nfirst token of the short request after {first:.2f} s, all 16 after {whole:.2f} s; prefill of {n_prompt} tokens "
          f"{alone:.2f} s alone, {result[0]:.2f} s beside it")
    assert first < 3
    assert result[0] < 1.15 * alone


def test_speed_of_a_saved_session(start, long_text, tmp_path):
    server = start("--slots", "1", "--session-dir", str(tmp_path))
    text, n_wanted = long_text, 7500
    if path := os.environ.get("NARROWS_TEXT"):
        text, n_wanted = open(path, encoding="utf-8").read(), 16000
    tokens = server.post("/tokenize", {"content": text})[1]["tokens"]
    assert len(tokens) >= n_wanted
    status, reply = server.post("/v1/completions", {"prompt": tokens[:n_wanted], "max_tokens": 1, "temperature": 0})
    assert status == 200, reply
    prefill_s = reply["narrows"]["prefill_s"]
    saved = server.post("/slots/0?action=save", {"filename": "long"})[1]
    server.post("/slots/0?action=erase", {})
    restored = [server.post("/slots/0?action=restore", {"filename": "long"})[1]["timings"]["restore_ms"] / 1e3 for _ in range(3)]
    smaller, sooner = saved["cache_bytes_f16"] / saved["n_written"], prefill_s / sorted(restored)[1]
    print(f"\n{n_wanted} tokens: file {saved['n_written'] / 1e6:.1f} MB, f16 {saved['cache_bytes_f16'] / 1e6:.1f} MB ({smaller:.2f} times smaller); "
          f"prefill {prefill_s:.1f} s, restore {sorted(restored)[1]:.3f} s ({sooner:.0f} times)")
    if n_wanted >= 16000:
        assert smaller >= 5
    assert sooner >= 20
