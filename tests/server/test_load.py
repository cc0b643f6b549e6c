"""Eight clients on four slots, some of which leave or send nonsense. NARROWS_LOAD_SECONDS=600 for the long run; by default it is short,
and memory is only judged by the long one."""

import json
import os
import random
import threading
import time

import pytest

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


@pytest.mark.timeout(SECONDS + 240)
def test_load(start, long_text):
    server = start("--slots", "4")
    requests = list(bodies(long_text))
    alone = [stream_text(server, body) for body in requests]
    end = time.monotonic() + SECONDS
    counts = {"equal": 0, "left": 0, "nonsense": 0}
    failures, rss = [], []

    def client(seed):
        draw = random.Random(seed)
        try:
            while time.monotonic() < end and not failures:
                kind = draw.random()
                i = draw.randrange(len(requests))
                if kind < 0.1:
                    status, _ = server.post("/v1/chat/completions", draw.choice(NONSENSE).encode("utf-8", "surrogatepass"))
                    assert status == 400
                    counts["nonsense"] += 1
                elif kind < 0.3:
                    stream_text(server, requests[i], leave_after=draw.randrange(12))
                    counts["left"] += 1
                else:
                    assert stream_text(server, requests[i]) == alone[i], f"request {i} gave another text"
                    counts["equal"] += 1
        except Exception as error:  # pylint: disable=broad-except
            failures.append(repr(error))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(N_CLIENT)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        time.sleep(min(5, SECONDS / 20))
        rss.append((time.monotonic(), server.rss_bytes()))
    for t in threads:
        t.join()
    assert failures == []
    assert counts["equal"] > 0 and counts["left"] > 0
    assert server.wait_until_idle(20) < 2
    _, metrics = server.get("/metrics")
    second = [b for t, b in rss if t > end - SECONDS / 2]
    print(f"{counts}, RSS in the second half {min(second) / 1e6:.0f} to {max(second) / 1e6:.0f} MB")
    if SECONDS >= LONG_RUN:
        early = [b for t, b in rss if end - SECONDS / 2 < t < end - SECONDS / 4]
        late = [b for t, b in rss if t > end - SECONDS / 4]
        assert max(late) < 1.02 * max(early), (max(early), max(late))
    assert server.stop() == 0
