"""/v1/embeddings, logprobs of an echoed prompt, id_slot: what a client gets."""

import base64
import math
import struct

TEXTS = ["The cat sleeps on the mat.", "A cat is asleep on a rug.", "Quarterly revenue rose by nine percent."]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


# docs/server_api.md: "POST /v1/embeddings", "a vector of length 1 for each text", "as counted in usage"
def test_a_list_gives_what_each_text_gives(server):
    status, reply = server.post("/v1/embeddings", {"input": TEXTS, "model": "any"})
    assert status == 200, reply
    assert reply["object"] == "list" and [d["index"] for d in reply["data"]] == [0, 1, 2]
    vectors = [d["embedding"] for d in reply["data"]]
    for vector in vectors:
        assert abs(sum(x * x for x in vector) - 1) < 1e-4
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])
    tokens = [server.post("/tokenize", {"content": t})[1]["tokens"] for t in TEXTS]
    assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] == sum(map(len, tokens))
    ids = server.post("/v1/embeddings", {"input": tokens})[1]
    assert [d["embedding"] for d in ids["data"]] == vectors
    alone = server.post("/v1/embeddings", {"input": tokens[1]})[1]
    assert alone["data"][0]["embedding"] == vectors[1]


# docs/server_api.md: "encoding_format float or base64", "POST /embedding, /embeddings"
def test_base64_and_llama_cpps_form(server):
    plain = server.post("/v1/embeddings", {"input": TEXTS[0]})[1]["data"][0]["embedding"]
    packed = server.post("/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"})[1]["data"][0]["embedding"]
    assert struct.unpack(f"<{len(plain)}f", base64.b64decode(packed)) == tuple(plain)
    for path in ("/embedding", "/embeddings"):
        assert server.post(path, {"content": TEXTS[0]})[1] == [{"index": 0, "embedding": [plain]}]


# docs/server_api.md: "dimensions other than the model's are refused", "Up to 2,048 texts"
def test_what_is_refused(server, long_text):
    for body in ({"input": TEXTS, "dimensions": 3}, {"input": []}, {"input": ""}, {}, {"input": "x", "encoding_format": "int8"},
                 {"input": [1, "x"]}, {"input": [10**9]}, {"input": ["x"] * 2049}):
        status, reply = server.post("/v1/embeddings", body)
        assert status == 400 and reply["error"]["message"], body
    status, reply = server.post("/v1/embeddings", {"input": ["short", long_text * 2]})
    assert status == 400 and reply["error"]["type"] == "exceed_context_size_error"
    assert server.post("/v1/embeddings", {"input": ["x"] * 100})[0] == 200  # more than the queue holds


# docs/server_api.md: "--pooling mean or last"
def test_pooling(server, start):
    last = start("--pooling", "last", "--slots", "1")
    mean = server.post("/v1/embeddings", {"input": TEXTS[0]})[1]["data"][0]["embedding"]
    other = last.post("/v1/embeddings", {"input": TEXTS[0]})[1]["data"][0]["embedding"]
    assert cosine(mean, other) < .99
    one = server.post("/tokenize", {"content": "cat"})[1]["tokens"][:1]
    both = [s.post("/v1/embeddings", {"input": one})[1]["data"][0]["embedding"] for s in (server, last)]
    assert cosine(*both) > .9999


# docs/server_api.md: "with logprobs those of the prompt's tokens too, of which the first is null"
def test_echo_with_logprobs(server):
    text = "The capital of France is Paris"
    tokens = server.post("/tokenize", {"content": text})[1]["tokens"]
    body = {"prompt": tokens, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    status, reply = server.post("/v1/completions", body)
    assert status == 200, reply
    choice = reply["choices"][0]
    said = choice["logprobs"]
    assert choice["text"].startswith(text)
    assert len(said["tokens"]) == len(said["token_logprobs"]) == len(said["top_logprobs"]) == len(tokens) + 1
    assert "".join(said["tokens"]) == choice["text"]
    assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
    assert all(x < 0 for x in said["token_logprobs"][1:])
    assert said["text_offset"] == [len("".join(said["tokens"][:i])) for i in range(len(said["tokens"]))]
    # What the model says after the words before it is what it says of them here, but for rounding: a tile of keys
    # shares what bf16-shift takes off them. (tests/engine/prompt_rows_test.cpp compares in float32.)
    for n in range(1, len(tokens)):
        one = server.post("/v1/completions", {"prompt": tokens[:n], "logprobs": 1, "max_tokens": 1, "temperature": 0})[1]
        top = one["choices"][0]["logprobs"]["top_logprobs"][0]
        assert said["top_logprobs"][n].keys() == top.keys()
        assert abs(max(said["top_logprobs"][n].values()) - max(top.values())) < .3
    none = server.post("/v1/completions", {**body, "prompt": text, "max_tokens": 0})[1]["choices"][0]
    assert none["text"] == text and none["logprobs"]["token_logprobs"] == said["token_logprobs"][:-1]
    chunks = [c for c in server.stream(text, path="/v1/completions", echo=True, logprobs=1, max_tokens=1) if c != "[DONE]"]
    streamed = [x for c in chunks for x in ((c["choices"][0]["logprobs"] or {}).get("token_logprobs") or [])]
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"] and streamed == said["token_logprobs"]


# docs/server_api.md: "the slot that the request must have; -1: any"
def test_id_slot(server):
    for slot in (2, 0, 2):
        assert server.chat("Hi", id_slot=slot)["narrows"]["slot"] == slot
    assert server.chat("Hi", id_slot=-1)["narrows"]["slot"] in range(4)
    for wrong in (4, -2, "1"):
        status, reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "id_slot": wrong})
        assert status == 400 and reply["error"]["param"] == "id_slot"
