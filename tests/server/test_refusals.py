"""What is wrong is refused with a sentence, whatever it is, and the server lives on."""

import json
import re
import socket

import pytest

CHAT = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def check_refusal(answer, status, *words):
    code, reply = answer
    assert code == status, reply
    error = reply["error"]
    assert error["code"] == status
    assert error["type"]
    for word in words:
        assert str(word) in error["message"], error
    return error


def still_well(server):
    assert server.post(CHAT, GOOD)[0] == 200


@pytest.mark.parametrize("body", [
    "", "{", "nonsense", "[]", "5", "null", '{"messages":}', '{"messages": [}', '{"a": 1e999}', '{"a": NaN}',
    '{"messages": [{"role": "user", "content": "\\ud800"}]}', "{" * 10000, "[" * 10000, '{"a":' * 5000,
    b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', '{"messages": [{"role": "user", "content": "x"}]} trailing',
])
def test_malformed_json(server, body):
    check_refusal(server.post(CHAT, body), 400)
    still_well(server)


@pytest.mark.parametrize("field,value", [
    ("temperature", -1), ("temperature", "hot"), ("temperature", float("1e308")), ("top_p", -0.5), ("top_p", 1.01), ("top_k", -2),
    ("min_p", -1), ("max_tokens", -5), ("max_tokens", 1.5), ("max_tokens", "many"), ("n", 0), ("n", 1000), ("n", -1), ("seed", "x"),
    ("seed", -7), ("presence_penalty", 5), ("frequency_penalty", -5), ("repeat_penalty", -1), ("stop", 7), ("stop", ["a"] * 100),
    ("stop", "x" * 10000), ("logit_bias", {"9999999": 1}), ("logit_bias", {"a": 1}), ("logit_bias", {"5": 1e9}), ("logprobs", "yes"),
    ("top_logprobs", 5), ("stream", 1), ("messages", []), ("messages", [{}]), ("messages", [{"role": "user"}, 5]),
    ("messages", [{"role": "nobody", "content": "x"}]), ("messages", [{"role": "user", "content": {"a": 1}}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("tools", [{"type": "function", "function": {}}]), ("response_format", {"type": "yaml"}),
    ("response_format", {"type": "json_schema"}), ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}),
    ("grammar", "root ::= ("), ("grammar", "root ::= missing"), ("grammar", "(" * 50000), ("narrows", {"kv": "zip"}), ("narrows", 3),
])
def test_fields_that_are_wrong(server, field, value):
    error = check_refusal(server.post(CHAT, {**GOOD, field: value}), 400)
    assert error["type"] == "invalid_request_error"
    check_refusal(server.post(CHAT, {**GOOD, "stream": True, field: value}), 400)  # before any event


def test_schemas_with_ill_will(server):
    deep = {"type": "object"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}
    for schema in (deep, wide, {"$ref": "#"}, {"type": "string", "pattern": "(" * 1000}, {"type": "string", "pattern": "^(a+)+$" * 200},
                   {"type": "array", "minItems": 10**9}, {"$ref": "file:///etc/passwd"}, {"$ref": "https://example.com/x.json"}):
        status, _ = server.post(CHAT, {**GOOD, "json_schema": schema})
        assert status in (200, 400)
    still_well(server)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml"])
def test_wrong_content_type(server, content_type):
    status, reply = server.post(CHAT, json.dumps(GOOD), headers={"Content-Type": content_type})
    assert status in (400, 415), reply
    still_well(server)


# docs/server_api.md: "the body is too large (--body-mb)"; "the headers are too large"
def test_huge_body_and_headers(start):
    server = start("--body-mb", "1")
    check_refusal(server.post(CHAT, {"messages": [{"role": "user", "content": "a" * 2_000_000}]}), 413)
    status, _ = server.get("/health", headers={"X-Long": "a" * 100_000})
    assert status in (400, 431)
    with socket.create_connection(server.address) as s:  # a chunked body without end
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(300):
                s.sendall(b"2000\r\n" + b"a" * 0x2000 + b"\r\n")
            reply = s.recv(1000)
        except (BrokenPipeError, ConnectionResetError):
            reply = b"closed"
        assert b"413" in reply or reply == b"closed" or reply == b""
    still_well(server)


@pytest.mark.parametrize("junk", [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 1000, b"POST /v1/chat/completions HTTP/1.1\r\n"
                                  b"Content-Length: 99999999999999999999\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{",
                                  b"GET /%00%ff%2e%2e/ HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\n\r\n"])
def test_what_is_no_http(server, junk):
    with socket.create_connection(server.address) as s:
        s.sendall(junk)
        s.shutdown(socket.SHUT_WR)
        s.settimeout(20)
        try:
            while s.recv(65536):
                pass
        except (ConnectionResetError, TimeoutError):
            pass
    still_well(server)


# docs/server_api.md: "the prompt is longer than the context; n_prompt_tokens and n_ctx beside the message"
@pytest.mark.parametrize("stream", [False, True])
def test_context_exceeded(start, stream):
    server = start("--ctx", "500")
    body = {"messages": [{"role": "user", "content": "word " * 600}], "stream": stream}
    error = check_refusal(server.post(CHAT, body), 400, "500")
    assert error["type"] == "exceed_context_size_error"
    assert error["n_ctx"] == 500
    assert error["n_prompt_tokens"] > 600
    status, reply = server.post("/v1/completions", {"prompt": "word " * 600, "stream": stream})
    assert reply["error"]["type"] == "exceed_context_size_error"
    # What just fits ends with the context, and says so.
    reply = server.post("/v1/completions", {"prompt": "word " * 480, "ignore_eos": True, "max_tokens": 1000, "temperature": 0})[1]
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] <= 501


# docs/server_api.md: "the cache that the prompt and max_tokens (1,024 if not given) need"
def test_memory_is_refused_with_figures(start):
    server = start("--cache-mb", "20")
    error = check_refusal(server.post(CHAT, {"messages": [{"role": "user", "content": "word " * 7000}]}), 503, "MB", "20 MB")
    assert error["type"] == "out_of_memory_error"
    still_well(server)


# docs/server_api.md: "until then it waits, up to --queue of them"
def test_queue_is_bounded(start):
    server = start("--slots", "1", "--queue", "1")
    streams = [server.stream("word " * 3000, max_tokens=200, ignore_eos=True, messages=[{"role": "user", "content": f"{i} " + "word " * 3000}])
               for i in range(4)]
    import threading
    results = []

    def drain(s):
        results.append(list(s))

    threads = [threading.Thread(target=drain, args=(s,)) for s in streams]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    refused = [r for r in results if isinstance(r[0], dict) and "error" in r[0]]
    assert len(refused) >= 1
    assert all(r[0]["error"]["code"] == 429 for r in refused)
    assert sum(r[-1] == "[DONE]" for r in results) == 4 - len(refused)


# docs/server_api.md: "503 while the model is loaded and while the server ends; needs no key"
# docs/server_api.md: "no key, or a wrong one"; "--api-key-file (one a line) asks for"
def test_keys(start, tmp_path):
    keys = tmp_path / "keys.txt"
    keys.write_text("# the keys\nsk-first\n\nsk-second\n")
    server = start("--api-key-file", str(keys))
    assert server.get("/health")[0] == 200
    assert server.get("/")[0] == 200
    check_refusal(server.get("/v1/models"), 401)
    check_refusal(server.post(CHAT, GOOD), 401)
    for wrong in ("sk-firs", "sk-first ", "# the keys", "", "SK-FIRST"):
        status, _ = server.get("/slots", headers={"Authorization": "Bearer " + wrong})
        assert status == 401 or wrong.strip() == "sk-first"
    status, _ = server.post(CHAT, GOOD, headers={"Authorization": "Bearer sk-second"})
    assert status == 200
    assert "sk-second" not in "".join(server.log)


def codes_of(server, text):
    """The status codes of what the server says to these bytes, until it closes."""
    with socket.create_connection(server.address) as s:
        s.sendall(text)
        s.settimeout(20)
        reply = b""
        try:
            while piece := s.recv(65536):
                reply += piece
        except ConnectionResetError:
            pass
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", reply)]


# docs/server_api.md: "A head that has a line of more than 8 KB or more than 100 of them gets 431"; "two Transfer-Encodings or Hosts are refused with 400."
def test_heads_that_nobody_should_send(server):
    get = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n"
    post = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    chunked = b"f\r\n{\"content\":\"a\"}\r\n0\r\n\r\n"
    host = b"Host: localhost\r\n"
    assert codes_of(server, get + host + b"X: " + b"a" * 8000 + b"\r\n\r\n") == [200]
    assert codes_of(server, get + host + b"X: " + b"a" * 63_000 + b"\r\n\r\n") == [431]
    assert codes_of(server, get + host + b"A: b\r\n" * 1000 + b"\r\n") == [431]
    assert codes_of(server, post + b"Transfer-Encoding: chunked\r\n\r\n" + chunked) == [200]
    assert codes_of(server, post + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n" + chunked) == [400]
    assert codes_of(server, post + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + chunked) == [400]
    assert codes_of(server, get + host + host + b"\r\n") == [400]
    assert codes_of(server, get + host + b"Host: evil.example\r\n\r\n") == [400]
    for name, code in (("localhost", 200), ("localhost:80", 200), ("127.0.0.1:", 200), ("[::1]:8080", 200), ("localhost:1@evil.example", 403),
                       ("localhost@evil.example", 403), ("localhost:x", 403), ("localhost.evil.example:80", 403), ("[::1]:80@evil", 403)):
        assert codes_of(server, get + f"Host: {name}\r\n\r\n".encode()) == [code], name


# docs/server_api.md: "A stop string that is empty is refused."
@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(server, stop):
    assert check_refusal(server.post(CHAT, {**GOOD, "stop": stop}), 400, "stop")["param"] == "stop"
    for nothing in (None, []):
        assert server.post(CHAT, {**GOOD, "stop": nothing})[0] == 200


def test_no_cors_unless_told(server):
    connection = server.connect()
    connection.request("OPTIONS", CHAT, headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
    response = connection.getresponse()
    assert response.headers.get("Access-Control-Allow-Origin") is None
    assert response.status != 204
    connection.close()


# docs/server_api.md: "a web page of another origin"; "Web pages of other origins are refused, with or without CORS"
def test_pages_of_others_are_refused(server):
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        check_refusal(server.post(CHAT, GOOD, headers=headers), 403)
    assert server.post(CHAT, GOOD, headers={"Origin": server.url})[0] == 200


# docs/server_api.md: "Only 127.0.0.1 is listened on unless --host says otherwise"
def test_listens_on_this_machine_alone(server):
    assert server.url.startswith("http://127.0.0.1:")


# docs/server_api.md: "a text that is too long for any tokens of the context is refused before all of it is read, and n_prompt_tokens may be less than it has"
def test_endless_texts_are_refused_before_they_are_read(start):
    server = start("--ctx", "2048")
    before = server.rss_bytes()
    for text in ("word " * 8_000_000, "x" * 300_000, "a word " * 20_000):
        for path, fields in ((CHAT, {"messages": [{"role": "user", "content": text}]}), ("/v1/completions", {"prompt": text})):
            status, reply = server.post(path, {**fields, "max_tokens": 1})
            assert (status, reply["error"]["type"]) == (400, "exceed_context_size_error")
            assert reply["error"]["n_prompt_tokens"] > reply["error"]["n_ctx"] == 2048
    assert server.rss_bytes() - before < 600e6
    # docs/server_api.md: "content has at most 2 MB"
    check_refusal(server.post("/tokenize", {"content": "x" * 2_100_000}), 400)
    assert server.post("/tokenize", {"content": "word " * 100_000})[0] == 200
