"""Figures that need an idle machine: NARROWS_SPEED=1 tools/server_tests.sh PROGRAM MODEL -s -k speed. They are printed, and held to the goals.
With NARROWS_TEXT=FILE the session is of 16,000 tokens, as a model with that context wants."""

import json
import os
import threading
import time

import pytest

pytestmark = [pytest.mark.skipif("NARROWS_SPEED" not in os.environ, reason="NARROWS_SPEED is not set: timings need an idle machine"),
              pytest.mark.timeout(900)]


def tokens_a_second(server, prompts, kv, n_token=100):
    """Of all streams in sum, while all of them write. What they read is thrown away: a client that decodes it would take the engine's cores."""
    for prompt in prompts:  # read before, so that no stream has written much when the last one begins
        assert server.post("/v1/completions", {"prompt": prompt, "max_tokens": 1, "narrows": {"kv": kv}})[0] == 200
    connections = []
    for prompt in prompts:
        connection = server.connect()
        connection.request("POST", "/v1/completions", json.dumps({
            "prompt": prompt, "temperature": 0, "max_tokens": 10 * n_token, "ignore_eos": True, "stream": True, "narrows": {"kv": kv}}),
            {"Content-Type": "application/json"})
        connections.append(connection)

    def drain(connection):
        try:
            while connection.sock.recv(1 << 20):
                pass
        except OSError:
            pass

    threads = [threading.Thread(target=drain, args=(c,)) for c in connections]
    for t in threads:
        t.start()

    def written(at_least):
        while True:
            slots = [s for s in server.get("/slots")[1] if s["state"] == "writing"]
            counts = [s["generated_tokens"] for s in slots]
            if len(counts) == len(prompts) and min(counts) >= at_least:
                return sum(counts), min(counts), time.monotonic()
            time.sleep(0.01)

    before, least, begin = written(5)
    after, _, end = written(least + n_token)
    for connection in connections:
        connection.sock.shutdown(2)
    for t in threads:
        t.join()
    for connection in connections:
        connection.close()
    server.wait_until_idle(20)
    return (after - before) / (end - begin)


# docs/server_api.md: "four streams with short contexts give 2.3 to 2.7 times the tokens a second of one"
@pytest.mark.parametrize("n_prompt", [20, 2000])
@pytest.mark.parametrize("kv", ["klt", "f16"])
def test_speed_of_four_streams(start, long_text, kv, n_prompt):
    server = start("--slots", "4")
    tokens = server.post("/tokenize", {"content": long_text})[1]["tokens"]
    prompts = [tokens[100 + i * 1200:][:n_prompt] for i in range(4)]
    tokens_a_second(server, prompts[:1], kv, 20)
    rounds = [(tokens_a_second(server, prompts[:1], kv), tokens_a_second(server, prompts, kv)) for _ in range(3)]
    one, four, ratio = (sorted(x) for x in zip(*((a, b, b / a) for a, b in rounds)))
    print(f"\n{kv}, prompts of {n_prompt} tokens: one stream {one[1]:.1f} tok/s ({one[0]:.1f} to {one[2]:.1f}), "
          f"four {four[1]:.1f} ({four[0]:.1f} to {four[2]:.1f}): {ratio[1]:.2f} times ({ratio[0]:.2f} to {ratio[2]:.2f})")
    # Each stream attends to its own cache: of 2,000 tokens that is more work than the weights of a small model, and no stream shares it.
    assert n_prompt > 20 or ratio[1] >= 2


# docs/server_api.md: "they get a third of the time while prompts are read"
def test_speed_of_a_short_request_in_a_long_prefill(start, long_text):
    server = start("--slots", "2")
    prompt = long_text[:28500]

    def read(tag):
        reply = server.chat(tag + prompt, max_tokens=1, cache_prompt=False)
        assert reply["usage"]["prompt_tokens"] > 6000
        return reply["narrows"]["prefill_s"]

    def read_beside_a_short_one(after_s):
        """(prefill, first token, all tokens) in seconds."""
        result = []
        thread = threading.Thread(target=lambda: result.append(read("b")))
        thread.start()
        while not server.slots_busy():
            pass
        time.sleep(after_s)
        begin = time.monotonic()
        first = None
        for event in server.stream("Say hello.", max_tokens=16, ignore_eos=True, cache_prompt=False):
            if first is None and event != "[DONE]" and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.monotonic() - begin
        whole = time.monotonic() - begin
        assert thread.is_alive(), "the long prompt was over before the short one"
        thread.join()
        return result[0], first, whole

    rounds = []
    for _ in range(3):
        alone = read("a")
        rounds.append((alone, *read_beside_a_short_one(alone / 4)))
    loss = sorted(r[1] / r[0] - 1 for r in rounds)
    alone, beside, first, whole = (sorted(x) for x in zip(*rounds))
    print(f"\nfirst token of the short request after {first[1]:.2f} s ({first[0]:.2f} to {first[2]:.2f}), all 16 after {whole[1]:.2f} s; prefill alone "
          f"{alone[1]:.2f} s, beside it {beside[1]:.2f} s: {100 * loss[1]:.1f} % longer ({100 * loss[0]:.1f} to {100 * loss[2]:.1f})")
    assert first[1] < 3
    assert loss[1] < 0.15


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
