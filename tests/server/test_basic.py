"""What every client relies on: health, models, properties, tokens, templates, metrics, the page."""

import json
import subprocess

from conftest import MODEL, PROGRAM


# docs/server_api.md: "GET /health"; "GET /v1/models"
def test_health_and_models(server):
    assert server.get("/health") == (200, {"status": "ok"})
    status, models = server.get("/v1/models")
    assert status == 200
    assert models["object"] == "list"
    assert models["data"][0]["meta"]["n_ctx_train"] == 8192


# docs/server_api.md: "GET /props"
def test_props(server):
    status, props = server.get("/props")
    assert status == 200
    assert props["total_slots"] == 4
    assert props["n_ctx"] == 8192
    assert props["kv"]["name"] == "klt"
    assert len(props["fingerprint"]) == 16


# docs/server_api.md: "POST /tokenize"; "POST /detokenize"
def test_tokenize_and_back(server):
    for text in ["Hello world", "Grüße, 世界 👋", "", " leading and trailing ", "line\nline\n\n"]:
        status, reply = server.post("/tokenize", {"content": text})
        assert status == 200
        status, back = server.post("/detokenize", {"tokens": reply["tokens"]})
        assert (status, back["content"]) == (200, text)


def test_tokenize_options(server):
    _, plain = server.post("/tokenize", {"content": "<|im_start|>", "parse_special": False})
    _, special = server.post("/tokenize", {"content": "<|im_start|>"})
    assert len(special["tokens"]) == 1 < len(plain["tokens"])
    _, pieces = server.post("/tokenize", {"content": "Hello there", "with_pieces": True})
    assert "".join(t["piece"] for t in pieces["tokens"]) == "Hello there"


# docs/server_api.md: "POST /apply-template"
def test_apply_template(server):
    status, reply = server.post("/apply-template", {"messages": [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]})
    assert status == 200
    assert "<|im_start|>system\nBe kind.<|im_end|>" in reply["prompt"]
    assert reply["prompt"].endswith("<|im_start|>assistant\n")


# docs/server_api.md: "GET /metrics"
def test_metrics_count(server):
    def value(name):
        status, text = server.get("/metrics")
        assert status == 200
        lines = [line for line in text.splitlines() if line.startswith(f"narrows_{name} ")]
        assert len(lines) == 1, name
        return float(lines[0].split()[1])

    before = {n: value(n) for n in ("generated_tokens_total", "prompt_tokens_total", "requests_total")}
    reply = server.chat("Count to three.", max_tokens=7)
    assert value("generated_tokens_total") - before["generated_tokens_total"] == reply["usage"]["completion_tokens"]
    assert value("prompt_tokens_total") - before["prompt_tokens_total"] == reply["usage"]["prompt_tokens"]
    assert value("requests_total") - before["requests_total"] == 1
    assert value("slots") == 4
    assert value("cache_bytes") > 0


def test_metrics_are_well_formed(server):
    _, text = server.get("/metrics")
    for line in text.splitlines():
        assert line.startswith(("# HELP narrows_", "# TYPE narrows_")) or float(line.split()[1]) >= 0


# docs/server_api.md: "GET / | the chat page"
def test_page_needs_nothing_from_elsewhere(server):
    status, html = server.get("/")
    assert status == 200
    _, js = server.get("/chat.js")
    _, css = server.get("/chat.css")
    scripts = [js, server.get("/markdown.js")[1], server.get("/store.js")[1]]
    for text in (html, css, *scripts):
        assert "http://" not in text and "https://" not in text
    for script in scripts:
        assert len(script) > 500 and "innerHTML" not in script


# docs/server_api.md: "no such path or slot"
def test_unknown_path_and_method(server):
    status, reply = server.get("/v2/models")
    assert (status, reply["error"]["code"]) == (404, 404)
    status, reply = server.request("DELETE", "/v1/models")
    assert (status, reply["error"]["code"]) == (405, 405)
    status, reply = server.get("/v1/chat/completions")
    assert status == 405


def test_wrong_command_lines_exit_with_2(tmp_path):
    for options in (["--port", "70000"], ["--slots", "0"], ["--kv", "nonsense"], ["--session-dir", str(tmp_path / "none")],
                    ["--api-key-file", str(tmp_path / "none")], ["--ctx", "100000"], ["--host", "256.0.0.1"]):
        done = subprocess.run([PROGRAM, "serve", "-m", MODEL, *options, *([] if "--port" in options else ["--port", "0"])],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, (options, done.stderr)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("narrows: "), last


# docs/server_api.md: "Exit code 0."
def test_sigterm_exits_0_and_logs_json(start):
    s = start()
    s.chat("Hello", max_tokens=3)
    assert s.stop() == 0
    events = [json.loads(line)["event"] for line in s.log]
    assert events[0] == "listening" and events[-1] == "ended"
    assert {"ready", "generation", "request", "ending"} <= set(events)
    assert "Hello" not in "".join(s.log)
