"""Servers to test against: `narrows serve` of this build with the default model, on a free port."""

import http.client
import json
import os
import signal
import subprocess
import tempfile
import threading
import time

import pytest

PROGRAM = os.environ["NARROWS_PROGRAM"]
MODEL = os.environ["NARROWS_MODEL"]
# Its chat template knows tools (`make model-qwen`); tests that need it are skipped without.
TOOL_MODEL = os.path.join(os.path.dirname(MODEL), "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf")


class Server:
    """One process. Its log is kept; `url` is where it listens."""

    def __init__(self, *options, wait=True, model=MODEL):
        self.log = []
        self.process = subprocess.Popen(
            [PROGRAM, "serve", "-m", model, "--port", "0", *options],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = threading.Event()
        self.url = None
        threading.Thread(target=self._read_log, daemon=True).start()
        deadline = time.monotonic() + 120
        while not self.ready.is_set() if wait else self.url is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not start:\n" + "".join(self.log))
            time.sleep(0.02)

    def _read_log(self):
        for line in self.process.stderr:
            self.log.append(line)
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == "listening":
                self.url = event["url"]
            if event.get("event") == "ready":
                self.ready.set()

    @property
    def address(self):
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host.strip("[]"), int(port)

    def connect(self, timeout=300):
        return http.client.HTTPConnection(*self.address, timeout=timeout)

    def request(self, method, path, body=None, headers=None, timeout=300):
        """(status, JSON or text). A body that is no str is sent as JSON."""
        connection = self.connect(timeout)
        headers = dict(headers or {})
        if body is not None and not isinstance(body, (str, bytes)):
            body = json.dumps(body)
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "strict")
        finally:
            connection.close()
        kind = response.headers.get("Content-Type", "")
        return response.status, json.loads(text) if kind.startswith("application/json") else text

    def get(self, path, **kw):
        return self.request("GET", path, **kw)

    def post(self, path, body, **kw):
        return self.request("POST", path, body, **kw)

    def chat(self, content, **fields):
        """The reply to one message; greedy unless told."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 16, **fields}
        status, reply = self.post("/v1/chat/completions", body)
        assert status == 200, reply
        return reply

    def stream(self, content, path="/v1/chat/completions", **fields):
        """The events of a stream, one by one; "[DONE]" as a string."""
        body = {"temperature": 0, "max_tokens": 16, "stream": True, **fields}
        if path.endswith("chat/completions"):
            body.setdefault("messages", [{"role": "user", "content": content}])
        else:
            body["prompt"] = content
        connection = self.connect()
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            yield json.loads(response.read())
            return
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for line in response:
            line = line.decode("utf-8", "strict").rstrip("\r\n")
            if line.startswith("data: "):
                yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])
        connection.close()

    def slots_busy(self):
        return sum(slot["state"] != "idle" for slot in self.get("/slots")[1])

    def wait_until_idle(self, seconds):
        """How long it took; fails after `seconds`."""
        begin = time.monotonic()
        while self.slots_busy():
            assert time.monotonic() - begin < seconds, "slots are still at work"
            time.sleep(0.02)
        return time.monotonic() - begin

    def begin_stream(self, content, **fields):
        """A stream whose first event has come: the response, to be read on."""
        connection = self.connect()
        connection.request("POST", "/v1/chat/completions", json.dumps({
            "messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True, "ignore_eos": True, **fields}),
            {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.readline()
        return response

    def rss_bytes(self):
        with open(f"/proc/{self.process.pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self):
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def sessions_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.fixture(scope="session")
def server(sessions_folder):
    """Shared by all tests that leave it as they found it."""
    s = Server("--slots", "4", "--session-dir", sessions_folder)
    yield s
    assert s.stop() == 0


@pytest.fixture(scope="session")
def tool_server():
    if not os.path.exists(TOOL_MODEL):
        pytest.skip("no model whose template knows tools: make model-qwen")
    s = Server("--slots", "2", "--ctx", "24576", model=TOOL_MODEL)
    yield s
    assert s.stop() == 0


@pytest.fixture
def start():
    """Makes servers of one test: start(options...)."""
    made = []

    def start_one(*options, **kw):
        made.append(Server(*options, **kw))
        return made[-1]

    yield start_one
    for s in made:
        s.stop()


@pytest.fixture(scope="session")
def long_text():
    """English, about 7,600 tokens."""
    with open("/usr/share/common-licenses/GPL-3", encoding="utf-8") as f:
        return f.read()
