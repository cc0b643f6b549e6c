"""How the server ends, and what it writes to standard error."""

import http.client
import json
import os
import signal
import socket
import threading
import time

import pytest


def last_of(response):
    """The last event of a stream, which must be whole ("[DONE]" as a string)."""
    lines = [line for line in response.read().decode("utf-8", "strict").splitlines() if line.startswith("data: ")]
    return "[DONE]" if lines[-1] == "data: [DONE]" else json.loads(lines[-1][6:])


# docs/server_api.md: "SIGTERM and SIGINT end the server: new requests are refused with 503 ..., those at work have 10 seconds"
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_streams_end_well(start, number):
    server = start("--slots", "2")
    streams = [server.begin_stream(f"Story {i}.", max_tokens=100) for i in range(3)]
    begin = time.monotonic()
    server.process.send_signal(number)
    while server.get("/health")[0] != 503:
        time.sleep(0.01)
    assert "shutting down" in server.get("/health")[1]["error"]["message"]
    status, reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert (status, reply["error"]["type"]) == (503, "unavailable_error")
    assert server.get("/metrics")[0] == 200
    for event in map(last_of, streams):  # 1 or 2 s of the 10, unless the machine is busy
        assert event == "[DONE]" or (event["error"]["code"] == 503 and time.monotonic() - begin >= 10), event
    assert server.process.wait(20) == 0
    events = [json.loads(line)["event"] for line in server.log]
    assert events[-2:].count("ended") == 1 and "ending" in events
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address)


# docs/server_api.md: "then the rest gets an error event"
def test_what_takes_longer_is_told(start):
    server = start("--slots", "2")
    streams = [server.begin_stream(f"Story {i}.", max_tokens=8000, narrows={"kv": "f16"}) for i in range(2)]
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for event in map(last_of, streams):
        assert event == "[DONE]" or event["error"]["code"] == 503
    assert server.process.wait(30) == 0
    print(f"ended after {time.monotonic() - begin:.2f} s")


# docs/server_api.md: "what cannot be interrupted (a text that is cut into tokens) is left behind"
def test_tokenizing_does_not_keep_the_server(start):
    """Sixteen words of 2 MB are some 5 s of work each; without a bound the server waited for all of it."""
    server = start("--slots", "1")
    word = "".join(chr(97 + i * 7 % 26) for i in range(2_000_000))
    codes = []

    def ask():
        try:
            codes.append(server.post("/tokenize", {"content": word})[0])
        except (ConnectionError, http.client.HTTPException) as error:
            codes.append(repr(error))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for t in threads:
        t.start()
    deadline = time.monotonic() + 60  # all are at work: their bodies have been read
    while len(os.listdir(f"/proc/{server.process.pid}/task")) < 19 and not codes and time.monotonic() < deadline:
        time.sleep(0.01)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    seconds = time.monotonic() - begin
    for t in threads:
        t.join()
    print(f"ended after {seconds:.2f} s: {codes}")
    assert seconds < 18  # 10, 2 for last bytes, and a busy machine
    assert set(codes) <= {200, 503}


# docs/server_api.md: "A second signal ends the process at once"
def test_a_second_signal_ends_at_once(start):
    server = start("--slots", "1")
    stream = server.begin_stream("Story.", max_tokens=8000)
    server.process.send_signal(signal.SIGTERM)
    while server.get("/health")[0] != 503:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert server.process.wait(20) == 143
    assert time.monotonic() - begin < 5  # of 10
    stream.close()


# docs/server_api.md: "as the first one does while the model is loaded: exit code 143 or 130"
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_at_once(start, number):
    server = start(wait=False)  # it listens, and begins to load
    server.process.send_signal(number)
    assert server.process.wait(20) == 128 + number
    assert not any('"ready"' in line for line in server.log)


# docs/server_api.md: "Logs are one line of JSON an event on standard error"
def test_every_line_of_the_log_is_json(start):
    server = start()
    chat = {"messages": [{"role": "user", "content": "x\nFORGED"}], "max_tokens": 2}
    for pattern in ("a\nFORGED(?=b)", "^a$\nFORGED", "(?<!x)\r\nFORGED"):
        server.post("/v1/chat/completions", {**chat, "response_format": {
            "type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": pattern}}}})
    server.post("/v1/chat/completions", {**chat, "grammar": 'root ::= "a"\nFORGED ::= FORGED'})
    server.post("/v1/chat/completions", {**chat, "narrows": {"kv": "a\nFORGED"}})
    server.request("GET", "/a%0aFORGED%0d%0a?x=%0aFORGED")
    server.request("GET", "/health", headers={"X-Forwarded-For": "1\tFORGED", "User-Agent": "FORGED"})
    for raw in (b"FORGED\r\n\r\n", b"GET /\nFORGED HTTP/1.1\r\n\r\n", b"POST /x\nFORGED HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n"):
        with socket.create_connection(server.address) as s:
            s.sendall(raw)
            s.shutdown(socket.SHUT_WR)
            s.recv(1000)
    assert server.stop() == 0
    for line in server.log:
        assert isinstance(json.loads(line), dict), line


def test_an_ipv6_address_has_brackets(start):
    try:
        socket.socket(socket.AF_INET6).bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = start("--host", "::1")
    assert server.url.startswith("http://[::1]:")
    assert server.get("/health")[0] == 200
    assert server.get("/v1/models")[0] == 200
