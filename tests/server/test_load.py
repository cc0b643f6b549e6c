"""Eight clients on four slots, some of which leave, send nonsense or half a request, ask for JSON, save and restore; at the end SIGTERM.
NARROWS_LOAD_SECONDS=600 for the long run; by default it is short, and memory is only judged by the long one."""

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time

import pytest

from test_end import last_of
from test_slow_clients import half_sent
from watch import Watch

SECONDS = float(os.environ.get("NARROWS_LOAD_SECONDS", "15"))
N_CLIENT = 8
LONG_RUN = 300  # from here on memory is judged: a shorter run is all warm-up


def bodies(long_text):
    """Requests of many lengths, some with a common beginning."""
    for i in range(12):
        n = (20, 300, 1500, 6000)[i % 4]
        start = 0 if i % 3 == 0 else 700 * i
        yield {"messages": [{"role": "user", "content": long_text[start:start + n] + f"\n\nQuestion {i}: what is this?"}],
               "temperature": 0, "max_tokens": 10 + 6 * i, "ignore_eos": True, "stream": True}


def stream_text(server, body, leave_after=None):
    """The text of a stream; None if this client left after so many events."""
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    text, n = "", 0
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            connection.close()
            return text
        event = json.loads(line[6:])
        assert "error" not in event, event
        text += "".join(c["delta"].get("content", "") for c in event["choices"])
        n += 1
        if leave_after is not None and n > leave_after:
            connection.sock.close()
            connection.close()
            return None
    raise AssertionError("the stream broke off")


NONSENSE = ["{", "[]", "{}", '{"messages": 5}', '{"messages": [{"role": "user", "content": "x"}], "temperature": -1}',
            '{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}', "\udc00"]


SCHEMA = {"type": "json_schema", "json_schema": {"schema": {
    "$defs": {"tree": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "children": {
        "type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/tree"}}}, "required": ["name"]}},
    "$ref": "#/$defs/tree"}}}
CIRCLE = {"type": "json_schema", "json_schema": {"schema": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "allOf": [{"$ref": "#/$defs/a"}]}}}


def ask_for_json(server, draw):
    """A schema that consumes and one that does not."""
    chat = {"messages": [{"role": "user", "content": "A tree of animals, as JSON."}], "max_tokens": 40, "seed": draw.randrange(1000)}
    assert server.post("/v1/chat/completions", {**chat, "response_format": CIRCLE})[0] == 400
    status, reply = server.post("/v1/chat/completions", {**chat, "response_format": SCHEMA})
    assert status == 200, reply
    choice = reply["choices"][0]
    if choice["finish_reason"] == "stop":
        assert "name" in json.loads(choice["message"]["content"])


def save_and_restore(server, draw):
    """Between the others: a slot may be at work, or empty."""
    name = f"s{draw.randrange(3)}"
    status, reply = server.post(f"/slots/{draw.randrange(4)}?action=save", {"filename": name})
    assert status in (200, 400, 409), reply
    if status == 200:
        status, reply = server.post(f"/slots/{draw.randrange(4)}?action=restore", {"filename": name})
        assert status in (200, 409), reply


@pytest.mark.timeout(SECONDS + 240)
def test_load(start, long_text, tmp_path):
    server = start("--slots", "4", "--session-dir", str(tmp_path))
    requests = list(bodies(long_text))
    alone = [stream_text(server, body) for body in requests]
    end = time.monotonic() + SECONDS
    counts = {"equal": 0, "left": 0, "nonsense": 0, "json": 0, "saved": 0, "half sent": 0}
    failures, rss = [], []

    def client(seed, sockets):
        draw = random.Random(seed)
        try:
            while time.monotonic() < end and not failures:
                kind = draw.random()
                i = draw.randrange(len(requests))
                if kind < 0.1:
                    status, _ = server.post("/v1/chat/completions", draw.choice(NONSENSE).encode("utf-8", "surrogatepass"))
                    assert status == 400
                    counts["nonsense"] += 1
                elif kind < 0.25:
                    stream_text(server, requests[i], leave_after=draw.randrange(12))
                    counts["left"] += 1
                elif kind < 0.35:
                    ask_for_json(server, draw)
                    counts["json"] += 1
                elif kind < 0.45:
                    save_and_restore(server, draw)
                    counts["saved"] += 1
                elif kind < 0.6:
                    s = sockets.enter_context(socket.create_connection(server.address))
                    s.sendall(half_sent(i))
                    counts["half sent"] += 1
                else:
                    assert stream_text(server, requests[i]) == alone[i], f"request {i} gave another text"
                    counts["equal"] += 1
        except Exception as error:  # pylint: disable=broad-except
            failures.append(repr(error))

    watch = Watch(server)
    with contextlib.ExitStack() as sockets:
        threads = [threading.Thread(target=client, args=(seed, sockets)) for seed in range(N_CLIENT)]
        for t in threads:
            t.start()
        while any(t.is_alive() for t in threads):
            time.sleep(min(5, SECONDS / 20))
            rss.append((time.monotonic(), server.rss_bytes()))
        for t in threads:
            t.join()
    assert failures == []
    print(counts)
    assert all(counts.values())
    assert server.wait_until_idle(20) < 2
    watch.end()
    second = [b for t, b in rss if t > end - SECONDS / 2]
    print(f"RSS in the second half {min(second) / 1e6:.0f} to {max(second) / 1e6:.0f} MB")
    if SECONDS >= LONG_RUN:
        early = [b for t, b in rss if end - SECONDS / 2 < t < end - SECONDS / 4]
        late = [b for t, b in rss if t > end - SECONDS / 4]
        assert max(late) < 1.02 * max(early), (max(early), max(late))

    # Streams that are written, that are read for and that wait, when the server is told to end.
    def n_taken():
        lines = server.get("/metrics")[1].splitlines()
        return int(next(line for line in lines if line.startswith("narrows_requests_total")).split()[1])

    before = n_taken()
    streams = [server.begin_stream(long_text[900 * i:900 * i + 200], max_tokens=150) for i in range(4)]
    more = []
    waiting = [threading.Thread(target=lambda i=i: more.append(last_of(server.begin_stream(long_text[700 * i:700 * i + 3000], max_tokens=30))))
               for i in range(4)]
    for t in waiting:
        t.start()
    while n_taken() < before + 8:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    for event in [last_of(s) for s in streams] + [t.join() for t in waiting] + more:
        assert event is None or event == "[DONE]" or event["error"]["code"] == 503, event
    assert len(more) == 4
    assert server.process.wait(30) == 0
    for line in server.log:
        assert isinstance(json.loads(line), dict), line
