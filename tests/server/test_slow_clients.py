"""Clients that are silent, slow or many, beside others that want an answer."""

import contextlib
import http.client
import json
import os
import resource
import socket
import threading
import time

import conftest
import pytest
from watch import Watch

CHAT = "/v1/chat/completions"


def half_sent(n):
    """A part of a request of this server: nothing, half a head, half a body."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    request = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    return request[:(0, 40, len(request) - 5)[n % 3]]


# docs/server_api.md: "a client that is silent or slow takes no thread"; "/health and /metrics are answered within 0.1 s, whatever else is going on"
def test_hundreds_of_slow_clients(server):
    with contextlib.ExitStack() as stack:
        for i in range(400):
            s = stack.enter_context(socket.create_connection(server.address))
            s.sendall(half_sent(i))
        watch = Watch(server)
        begin = time.monotonic()
        server.chat("Say hello.", max_tokens=8)
        assert time.monotonic() - begin < 8
        time.sleep(1)
        watch.end()


# While prompts are read, klt caches made of them (1,200 tokens are enough for one), and the queue is full.
def test_health_while_the_engine_is_at_work(start, long_text):
    server = start("--slots", "2", "--queue", "4")
    watch = Watch(server)
    codes = []

    def ask(i):
        status, reply = server.post(CHAT, {"messages": [{"role": "user", "content": f"{i} " + long_text[:5000]}], "max_tokens": 8})
        codes.append((status, reply["error"]["type"] if status != 200 else ""))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(9)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    watch.end()
    assert sorted(codes) == [(200, "")] * 6 + [(429, "rate_limit_error")] * 3


# docs/server_api.md: 429, "with Retry-After", and the defaults of --slots and --queue reach it
def test_the_default_queue_is_full_at_68(server):
    server.wait_until_idle(60)
    with contextlib.ExitStack() as stack:
        body = json.dumps({"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 8000, "ignore_eos": True})
        request = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        clients = [stack.enter_context(socket.create_connection(server.address)) for _ in range(4 + 64)]
        for s in clients:
            s.sendall(request)
        deadline = time.monotonic() + 30
        while "narrows_requests_waiting 64\n" not in server.get("/metrics")[1]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        connection = server.connect()
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
        assert json.loads(response.read())["error"]["type"] == "rate_limit_error"
        connection.close()
        begin = time.monotonic()
        assert server.get("/health")[0] == 200
        assert server.post("/tokenize", {"content": "a"})[0] == 200
        assert time.monotonic() - begin < 2
    server.wait_until_idle(60)


# docs/server_api.md: "--connections (256) may wait for a request; of more, the one that has waited longest is closed"
def test_connections_are_bounded(start):
    server = start("--connections", "10")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(server.address)) for _ in range(50)]
        assert server.get("/health")[0] == 200
        clients[0].settimeout(5)
        assert clients[0].recv(1) == b""
        server.chat("Hello", max_tokens=2)


# docs/server_api.md: "where the system lets the process have few descriptors, half of those may"
def test_few_descriptors_are_not_used_up(start, tmp_path, monkeypatch):
    few = tmp_path / "few"
    few.write_text(f'#!/bin/bash\nulimit -n 64\nexec "{conftest.PROGRAM}" "$@"\n')
    few.chmod(0o755)
    monkeypatch.setattr(conftest, "PROGRAM", str(few))
    server = start()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(server.address)) for _ in range(200)]
        begin = time.monotonic()
        assert server.get("/health")[0] == 200
        server.chat("Hello", max_tokens=2)
        assert time.monotonic() - begin < 8  # silent connections are closed after 10 s
        clients[0].settimeout(5)
        assert clients[0].recv(1) == b""


# docs/server_api.md: "and as many requests may be at work or wait: of more each gets 429."
def test_requests_at_work_leave_descriptors(start, tmp_path, monkeypatch):
    few = tmp_path / "few"
    few.write_text(f'#!/bin/bash\nulimit -n 64\nexec "{conftest.PROGRAM}" "$@"\n')
    few.chmod(0o755)
    monkeypatch.setattr(conftest, "PROGRAM", str(few))
    server = start("--slots", "1", "--queue", "100")
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 7000, "ignore_eos": True})
    request = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(server.address)) for _ in range(80)]
        for s in clients:
            with contextlib.suppress(ConnectionError):  # 16 may wait without a request
                s.sendall(request)
        late = [stack.enter_context(socket.create_connection(server.address)) for _ in range(20)]
        for s in late:
            s.sendall(request)
        late[-1].settimeout(10)
        assert late[-1].recv(1000).startswith(b"HTTP/1.1 429 ")
        for _ in range(20):
            begin = time.monotonic()
            assert server.get("/health", timeout=10)[0] == 200
            assert time.monotonic() - begin < 1
        assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < 60
    deadline = time.monotonic() + 60
    while server.get("/slots")[0] != 200:  # until it is noticed that they have left
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.wait_until_idle(60)
    server.chat("Hello", max_tokens=2)


def cpu_seconds(server):
    with open(f"/proc/{server.process.pid}/stat", encoding="utf-8") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# docs/server_api.md: "While no descriptor is left at all, new connections wait in the system's queue."
def test_no_descriptor_at_all(start):
    server = start()
    pid = server.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    n_open = max(int(fd) for fd in os.listdir(f"/proc/{pid}/fd")) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (n_open, hard))
    with socket.create_connection(server.address) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        before = cpu_seconds(server)
        time.sleep(2)
        assert cpu_seconds(server) - before < 0.2  # 0.8 where each accept() is followed by the next
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        s.settimeout(20)
        assert s.recv(1000).startswith(b"HTTP/1.1 200 ")
    server.chat("Hello", max_tokens=2)


def ask_and_shut(server, body, version="1.1"):
    """A client that has sent its request and closed its side."""
    body = json.dumps({"messages": [{"role": "user", "content": "Count to a hundred."}], "temperature": 0, "ignore_eos": True, **body})
    s = socket.create_connection(server.address)
    s.settimeout(60)
    s.sendall(f"POST {CHAT} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    s.shutdown(socket.SHUT_WR)
    return s


def text_of(response, stream):
    content = response.read().decode("utf-8", "strict")
    if not stream:
        return json.loads(content)["choices"][0]["message"]["content"]
    lines = [line[6:] for line in content.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return "".join(choice["delta"].get("content", "") for line in lines[:-1] for choice in json.loads(line)["choices"])


# docs/server_api.md: "A client that has sent its request may close its side (shutdown, nc -N) and gets its whole answer; it has left when its connection is
# closed or reset."
# docs/server_api.md: "cannot be asked, and its answer is made to its end."
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_client_that_sends_no_more_gets_its_answer(server, stream, version):
    server.wait_until_idle(60)
    whole = server.chat("Count to a hundred.", max_tokens=150, ignore_eos=True)["choices"][0]["message"]["content"]
    if (stream, version) == (True, "1.0"):
        pytest.skip("HTTP/1.0 knows no chunks, which streams are sent in")
    with ask_and_shut(server, {"max_tokens": 150, "stream": stream}, version) as s:
        response = http.client.HTTPResponse(s)
        response.begin()
        assert response.status == 200
        assert text_of(response, stream) == whole


# docs/server_api.md: "To tell one from the other, such a client is written to: a : ping in a stream, else an interim 100 Continue, at most five of them."
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_sends_no_more_and_leaves(server, long_text, stream):
    server.wait_until_idle(60)
    s = ask_and_shut(server, {"max_tokens": 4000, "stream": stream, "messages": [{"role": "user", "content": f"{stream}, shut: " + long_text[:25000]}]})
    seen = b""
    while (b": ping" if stream else b"100 Continue") not in seen:
        piece = s.recv(4096)
        assert piece, seen
        seen += piece
        assert seen.count(b"HTTP/1.1 ") <= 5
    deadline = time.monotonic() + 20
    while not server.slots_busy():  # the interim reply may come while the prompt is cut into tokens
        assert time.monotonic() < deadline
        time.sleep(0.01)
    s.close()
    assert server.wait_until_idle(20) < 8  # written to 2 s later, seen at the next look
