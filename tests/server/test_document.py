"""docs/server_api.md, sentence by sentence: the tests that hold it to its word, and those of its promises that are small enough to be held here."""

import json
import os
import re
import subprocess
import time

from conftest import PROGRAM

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, "max_tokens": 4}

# What the document says without promising it: pointers, reasons, advice.
NO_PROMISES = [
    "Guarded by", "| code | type", "| field | what", "Written by action=save", "cache_layout.md says why", "let only those you trust",
    "Several models, TLS, speculative decoding", "there is no TLS: put a proxy before it", "layers, one after another", "One thread owns the engine", "One thread (src/server/front.cpp)", "As OpenAI's, with",
]


def plain(text):
    """Without marks and line ends. (Citations stand in quotes: the document's own are left out for them.)"""
    return re.sub(r"\s+", " ", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("**", ""))


def pieces(document):
    """Its sentences and the rows of its tables."""
    document = re.sub(r"```.*?```", "", document, flags=re.S)
    for block in re.split(r"\n\s*\n", document):
        if block.startswith("#"):
            continue
        if block.startswith("|"):
            yield from (plain(row) for row in block.splitlines() if not re.fullmatch(r"[|\-\s]*", row))
        else:
            yield from re.split(r"(?<=[.;])\s+(?=[^a-z])", plain(block).strip())


def citations():
    """(file, words): what tests say in comments `docs/server_api.md: "words ... words", "words"`."""
    for folder, _, names in os.walk(os.path.join(ROOT, "tests")):
        for name in names:
            if not name.endswith((".cpp", ".py")):
                continue
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                text = f.read()
            for comment in re.findall(r"(?:^[ \t]*(?://|#) .*\n)+", text, re.M):
                comment = plain(re.sub(r"^[ \t]*(?://|#) ", "", comment, flags=re.M))
                for words in re.findall(r'"([^"]+)"', comment.partition("docs/server_api.md:")[2]):
                    yield from ((name, part.strip(" ,;.")) for part in words.split("...") if part.strip(" ,;."))


def test_every_sentence_has_a_test_and_every_test_its_sentence():
    with open(os.path.join(ROOT, "docs", "server_api.md"), encoding="utf-8") as f:
        document = f.read().replace('"', "")
    said = "\n".join(pieces(document))
    cited = set(citations())
    # A citation stands for the one place that has its words, and for no other sentence.
    assert [(c, said.count(c[1])) for c in sorted(cited) if said.count(c[1]) != 1 or len(c[1]) < 10] == []
    covered = bytearray(len(said))
    for words in [w for _, w in cited] + NO_PROMISES:
        at = said.find(words)
        while at >= 0:
            covered[at:at + len(words)] = b"x" * len(words)
            at = said.find(words, at + 1)
    # Each part between full stops and semicolons has words of its own that are cited.
    parts = [m for m in re.finditer(r"[^\n]+?(?:[.;](?=\s)|(?=\n|$))", said) if len(m.group().strip(" |.;")) > 3]
    assert [m.group() for m in parts if sum(covered[m.start():m.end()]) < min(10, len(m.group().strip(" |.;"))) * ord("x")] == []


# docs/server_api.md: "narrows serve --help lists the options."
def test_help_lists_the_options():
    done = subprocess.run([PROGRAM, "serve", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    with open(os.path.join(ROOT, "docs", "server_api.md"), encoding="utf-8") as f:
        options = set(re.findall(r"`(--[a-z-]+)", f.read())) - {"--help", "--session"}
    assert {"--slots", "--queue", "--connections", "--cache-mb"} <= options
    assert [o for o in sorted(options) if o not in done.stdout] == []


# docs/server_api.md: "prompt is a string, an array of strings, of token ids, or of arrays of ids (at most 64)"
def test_forms_of_prompts(server):
    ids = server.post("/tokenize", {"content": "One, two,"})[1]["tokens"]
    ask = lambda prompt: server.post("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 1})
    text = ask("One, two,")[1]["choices"][0]["text"]
    for prompt in (["One, two,"], ids, [ids], [ids, ids]):
        status, reply = ask(prompt)
        assert status == 200
        assert {c["text"] for c in reply["choices"]} == {text}
    assert len(ask(["a"] * 64)[1]["choices"]) == 64
    assert ask(["a"] * 65)[0] == 400


# docs/server_api.md: "Numbers that are out of range or no numbers are refused by name, and so is each field of OpenAI, llama.cpp or vLLM that this server knows"
# docs/server_api.md: "messages (roles"; "max_tokens (also max_completion_tokens, n_predict"; "-1: until the model ends), n (to 16)"; "are named in warnings of the reply"
# docs/server_api.md: "Fields that change neither an answer nor its form (user, metadata, store, ...) are let pass"
def test_fields_by_name(server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for field, value in (("tools", tools), ("audio", {}), ("suffix", "x"), ("best_of", 2), ("n", 17), ("stop", ["a"] * 17), ("top_k", "x")):
        status, reply = server.post(CHAT, {**HI, field: value})
        assert (status, reply["error"]["param"]) == (400, field), reply
    status, reply = server.post(CHAT, {**HI, "best_of": 1, "stop": ["a"] * 16, "service_tier": "x", "colour": {"deep": [1]}})
    assert status == 200, reply
    assert ["colour" in w for w in reply["warnings"]] == [True]
    for name in ("max_tokens", "max_completion_tokens", "n_predict"):
        assert server.post(CHAT, {**HI, name: -2})[1]["error"]["param"] == name
        reply = server.post(CHAT, {"messages": HI["messages"], "temperature": 0, "ignore_eos": True, name: 3})[1]
        assert reply["usage"]["completion_tokens"] == 3


# docs/server_api.md: "-100 or false forbids a token"; "of the model's own distribution, before biases and temperature"
def test_logprobs_are_the_models_own(server):
    def first(**fields):
        reply = server.post(CHAT, {**HI, "max_tokens": 1, "logprobs": True, "top_logprobs": 5, "seed": 1, **fields})[1]
        return reply["choices"][0]["logprobs"]["content"][0]

    plain_one = first()
    assert first(temperature=1.7)["top_logprobs"] == plain_one["top_logprobs"]
    token = server.post("/tokenize", {"content": plain_one["token"]})[1]["tokens"][0]
    for bias in (False, -100):
        other = first(logit_bias={str(token): bias})
        assert other["token"] != plain_one["token"]
        assert other["top_logprobs"] == plain_one["top_logprobs"]


# docs/server_api.md: "Without seed one is drawn, and the reply tells it."
def test_the_seed_is_told(server):
    ask = lambda **fields: server.post(CHAT, {**HI, "temperature": 1.5, "max_tokens": 12, **fields})[1]
    drawn = [ask() for _ in range(2)]
    seeds = [r["narrows"]["seed"] for r in drawn]
    assert seeds[0] != seeds[1]
    assert ask(seed=seeds[0])["choices"][0]["message"] == drawn[0]["choices"][0]["message"]


# docs/server_api.md: "GET /slots"; "Beside usage, narrows holds slot, kv, budget and tokens_read"; "usage.prompt_tokens_details.cached_tokens"
# docs/server_api.md: "A stream carries it in the chunk with finish_reason"; "with several choices a list of them under narrows.choices"
def test_what_narrows_tells(server):
    fields = {"slot", "kv", "budget", "tokens_read", "cache_tokens", "cache_bytes", "cache_bytes_f16", "compression", "cached_tokens",
              "queue_s", "prefill_s", "prefill_tok_s", "decode_s", "decode_tok_s", "seed"}
    reply = server.post(CHAT, {**HI, "cache_prompt": False})[1]
    assert set(reply["narrows"]) == fields
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 == reply["narrows"]["cached_tokens"]
    slot = server.get("/slots")[1][reply["narrows"]["slot"]]
    assert (slot["state"], slot["cache_tokens"]) == ("idle", reply["narrows"]["cache_tokens"])
    several = server.post(CHAT, {**HI, "n": 2})[1]["narrows"]
    assert [set(c) for c in several["choices"]] == [fields, fields]
    events = list(server.stream("Say hello.", max_tokens=3))
    assert events[-1] == "[DONE]"
    holders = [e for e in events[:-1] if "narrows" in e]
    assert [e["choices"][0]["finish_reason"] for e in holders] == ["length"]
    assert set(holders[0]["narrows"]) == fields


# docs/server_api.md: "lines : ping come every 2 s while nothing else does, and data: [DONE] ends it."
def test_pings_while_nothing_comes(start):
    server = start("--slots", "1")
    first = server.begin_stream("Tell me a story.", max_tokens=8000)
    second = server.begin_stream("Say hello.", max_tokens=2)  # waits; begin_stream() has read its first line
    lines, begin = [], time.monotonic()
    while len([line for line in lines if line == b": ping\n"]) < 2:
        lines.append(second.readline())
    assert time.monotonic() - begin < 20
    first.close()
    assert b"data: [DONE]" in second.read()


# docs/server_api.md: "narrows.progress: index, prompt_tokens, cached_tokens, processed_tokens, seconds; such chunks have no choices."
def test_fields_of_progress(server):
    events = list(server.stream("word " * 500, max_tokens=1, return_progress=True))
    chunks = [e for e in events[:-1] if "progress" in e.get("narrows", {})]
    assert chunks
    for e in chunks:
        assert e["choices"] == []
        assert set(e["narrows"]["progress"]) == {"index", "prompt_tokens", "cached_tokens", "processed_tokens", "seconds"}


# docs/server_api.md: "no JSON, a field that is wrong (param)"; "the slot is at work"; "no such path or slot"
# docs/server_api.md: "{error: {message, type, param, code}}"
def test_errors_have_one_shape(server):
    server.wait_until_idle(60)
    stream = server.begin_stream("Tell me a story.", max_tokens=8000)
    busy = next(s["id"] for s in server.get("/slots")[1] if s["state"] != "idle")
    for answer, code, kind in ((server.post(CHAT, "{"), 400, "invalid_request_error"), (server.get("/nowhere"), 404, "not_found_error"),
                               (server.request("PUT", CHAT, "{}"), 405, "invalid_request_error"),
                               (server.post("/slots/99?action=erase", {}), 404, "not_found_error"),
                               (server.post(f"/slots/{busy}?action=erase", {}), 409, "invalid_request_error")):
        assert answer[0] == code
        assert set(answer[1]["error"]) == {"message", "type", "param", "code"}
        assert (answer[1]["error"]["code"], answer[1]["error"]["type"]) == (code, kind)
    stream.close()
    server.wait_until_idle(20)


# docs/server_api.md: "from the last end of a segment, 256 tokens apart, that both have in common, and never from within the last 128 tokens."
# docs/server_api.md: "Prefixes are shared among requests of the same profile alone."
def test_where_prefixes_end(server, long_text):
    ids = server.post("/tokenize", {"content": "Prefixes. " + long_text[:4000]})[1]["tokens"]

    def cached(n, kv):
        reply = server.post("/v1/completions", {"prompt": ids[:n], "max_tokens": 1, "temperature": 0, "narrows": {"kv": kv}})[1]
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert len(ids) > 700
    assert cached(700, "f16") == 0
    assert cached(700, "kivi-4") == 0
    for n in (700, 640, 600, 500):
        assert n - 128 - 256 < cached(n, "f16") <= n - 128


# docs/server_api.md: "All numbers little-endian as on the machine that wrote them (a mark tells)"
def test_the_head_of_a_session_file(server, sessions_folder):
    slot = server.post(CHAT, HI)[1]["narrows"]["slot"]
    assert server.post(f"/slots/{slot}?action=save", {"filename": "head"})[0] == 200
    path = os.path.join(sessions_folder, "head")
    with open(path, "rb") as f:
        data = f.read()
    os.remove(path)
    assert data[:16] == b"narrows session\n"
    number = lambda at, size: int.from_bytes(data[at:at + size], "little")
    assert (number(16, 4), number(20, 4)) == (1, 0x01020304)
    texts, at = [], 24
    for _ in range(2):
        n = number(at, 8)
        texts.append(data[at + 8:at + 8 + n].decode())
        at += 8 + n
    assert texts == [server.get("/props")[1]["fingerprint"], "klt"]


# docs/server_api.md: "A connection that asks for nothing is closed after 10 s, between requests after 5."
def test_idle_connections_end(server):
    import socket
    with socket.create_connection(server.address) as silent, socket.create_connection(server.address) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        begin = time.monotonic()
        for s, seconds in ((idle, 5), (silent, 10)):
            s.settimeout(30)
            while s.recv(4096):
                pass
            assert time.monotonic() - begin > seconds - 0.5


# docs/server_api.md: "{type: json_object}"; "the answer follows it, by llama.cpp's converter"
def test_a_schema_that_is_followed(server):
    reply = server.post(CHAT, {**HI, "max_tokens": 30, "response_format": {"type": "json_schema", "json_schema": {"schema": {
        "enum": ["red", "green"]}}}})[1]
    assert json.loads(reply["choices"][0]["message"]["content"]) in ("red", "green")
