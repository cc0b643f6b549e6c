"""Chat and completions: fields, streams, counts, schemas."""

import json

import pytest


def text_of(reply):
    return reply["choices"][0]["message"]["content"]


def streamed(events):
    """(text, reasons, events) of a chat stream that must end well."""
    events = list(events)
    assert events[-1] == "[DONE]", events
    chunks = [c for e in events[:-1] for c in e["choices"]]
    text = "".join(c["delta"].get("content", "") for c in chunks)
    return text, [c["finish_reason"] for c in chunks if c["finish_reason"]], events


# docs/server_api.md: "/v1/chat/completions | a chat; the model's own Jinja template is used"
def test_chat(server):
    reply = server.chat("What is the capital of France? Answer in one word.", max_tokens=30)
    assert "Paris" in text_of(reply)
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "stop"
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert reply["narrows"]["kv"] == "klt"
    assert reply["narrows"]["cache_bytes_f16"] > 0
    assert reply["narrows"]["decode_tok_s"] > 0


def test_max_tokens(server):
    for n in (0, 1, 5):
        reply = server.chat("Tell me a long story.", max_tokens=n)
        assert reply["usage"]["completion_tokens"] == n
        assert reply["choices"][0]["finish_reason"] == "length"


# docs/server_api.md: "or on whether it is streamed"
def test_stream_equals_whole(server):
    question = "Name three colours."
    whole = server.chat(question, max_tokens=24)
    text, reasons, events = streamed(server.stream(question, max_tokens=24, stream_options={"include_usage": True}))
    assert text == text_of(whole)
    assert len(reasons) == 1
    assert events[-2]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert events[-2]["choices"] == []
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({e["id"] for e in events[:-1]}) == 1


def test_seed_decides(server):
    def ask(seed):
        return text_of(server.chat("Write a line of a poem.", temperature=1.2, seed=seed, max_tokens=20))

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


# docs/server_api.md: "The i-th choice of a prompt has seed + i."
def test_choices(server):
    reply = server.chat("Write a line of a poem.", temperature=1.2, seed=3, n=3, max_tokens=12)
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2]
    assert len({c["message"]["content"] for c in reply["choices"]}) > 1
    assert reply["choices"][1]["message"]["content"] == text_of(
        server.chat("Write a line of a poem.", temperature=1.2, seed=4, max_tokens=12))
    texts = ["", "", ""]
    for event in list(server.stream("Write a line of a poem.", temperature=1.2, seed=3, n=3, max_tokens=12))[:-1]:
        for c in event["choices"]:
            texts[c["index"]] += c["delta"].get("content", "")
    assert texts == [c["message"]["content"] for c in reply["choices"]]


def test_stop_strings_cross_token_borders(server):
    full = text_of(server.chat("Count from 1 to 20, separated by commas.", max_tokens=60))
    assert len(full) > 20
    for begin in range(3, 12):  # cuts at every place of tokens
        stop = full[begin:begin + 4]
        want = full[:full.index(stop)]
        reply = server.chat("Count from 1 to 20, separated by commas.", max_tokens=60, stop=[stop, "never seen"])
        assert text_of(reply) == want
        assert reply["choices"][0]["finish_reason"] == "stop"
        text, _, _ = streamed(server.stream("Count from 1 to 20, separated by commas.", max_tokens=60, stop=stop))
        assert text == want


def test_streams_are_whole_characters(server):
    # Bytes of emoji and Chinese come as several tokens; every event must be valid UTF-8 (the client decodes strictly).
    prompt = "👋🌍🎉 你好，世界 ☃ " * 4
    events = list(server.stream(prompt, path="/v1/completions", max_tokens=60, ignore_eos=True))
    text = "".join(e["choices"][0]["text"] for e in events[:-1])
    whole = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True})[1]
    assert text == whole["choices"][0]["text"]
    assert any(ord(c) > 127 for c in text)


# docs/server_api.md: "POST /v1/completions"
def test_completions(server):
    status, reply = server.post("/v1/completions", {
        "prompt": ["The capital of France is", "Two plus two is"], "temperature": 0, "max_tokens": 6, "echo": True})
    assert status == 200
    assert reply["object"] == "text_completion"
    assert "Paris" in reply["choices"][0]["text"]
    assert reply["choices"][1]["text"].startswith("Two plus two is")
    tokens = server.post("/tokenize", {"content": "The capital of France is"})[1]["tokens"]
    same = server.post("/v1/completions", {"prompt": tokens, "temperature": 0, "max_tokens": 6})[1]
    assert same["usage"]["prompt_tokens"] == len(tokens)
    assert "Paris" in same["choices"][0]["text"]


def test_logprobs(server):
    reply = server.chat("Say yes or no.", logprobs=True, top_logprobs=3, max_tokens=5)
    content = reply["choices"][0]["logprobs"]["content"]
    assert "".join(t["token"] for t in content) == text_of(reply)
    for t in content:
        assert t["logprob"] <= 0
        assert bytes(t["bytes"]).decode() == t["token"]
        assert len(t["top_logprobs"]) == 3
        assert t["top_logprobs"][0]["token"] == t["token"]
        assert t["top_logprobs"][0]["logprob"] == t["logprob"]
    reply = server.post("/v1/completions", {"prompt": "One, two,", "temperature": 0, "max_tokens": 4, "logprobs": 2})[1]
    lp = reply["choices"][0]["logprobs"]
    assert len(lp["tokens"]) == len(lp["token_logprobs"]) == len(lp["top_logprobs"]) == len(lp["text_offset"]) == 4
    assert "".join(lp["tokens"]) == reply["choices"][0]["text"]


def test_logit_bias_forbids(server):
    first = server.chat("Say hello.", max_tokens=1, logprobs=True)
    token = server.post("/tokenize", {"content": text_of(first)})[1]["tokens"][0]
    other = server.chat("Say hello.", max_tokens=1, logit_bias={str(token): -100})
    assert text_of(other) != text_of(first)
    forced = server.chat("Say hello.", max_tokens=3, logit_bias={str(token): 100})
    assert text_of(forced) == text_of(first) * 3


def test_penalties_end_repetition(server):
    question = "Repeat the word no for ever."
    plain = text_of(server.chat(question, max_tokens=40, ignore_eos=True))
    apart = text_of(server.chat(question, max_tokens=40, ignore_eos=True, frequency_penalty=2, presence_penalty=2))
    assert len(set(apart.split())) > len(set(plain.split()))


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"},
                   "tags": {"type": "array", "items": {"enum": ["big", "small"]}, "maxItems": 3}},
    "required": ["city", "people", "tags"], "additionalProperties": False}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_schema(server, temperature):
    reply = server.chat("Describe Paris.", max_tokens=200, temperature=temperature, seed=5, response_format={
        "type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}})
    data = json.loads(text_of(reply))
    assert set(data) == {"city", "people", "tags"}
    assert isinstance(data["people"], int)
    assert set(data["tags"]) <= {"big", "small"} and len(data["tags"]) <= 3


# docs/server_api.md: "the same with a GBNF grammar; its start is the rule root"
def test_json_object_and_grammar(server):
    reply = server.chat("Give me a JSON object with one field.", max_tokens=120, response_format={"type": "json_object"})
    if reply["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text_of(reply)), dict)
    assert text_of(reply).lstrip().startswith("{")
    assert text_of(server.chat("Yes or no?", grammar='root ::= "maybe" | "perhaps"')) in ("maybe", "perhaps")


# docs/server_api.md: "cache profile of this request, as --kv"
def test_profile_of_a_request(server):
    for kv, budget in (("f16", "all"), ("kivi-4", "all"), ("klt:budget=64", None)):
        reply = server.chat("Hello", narrows={"kv": kv})
        assert reply["narrows"]["kv"] == kv
        if budget:
            assert reply["narrows"]["budget"] == budget


# docs/server_api.md: "roles system, developer, user, assistant, tool; content a string or parts of type text"
def test_parts_and_roles(server):
    reply = server.post("/v1/chat/completions", {"temperature": 0, "max_tokens": 4, "messages": [
        {"role": "developer", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Again"}]})
    assert reply[0] == 200
