"""One session with each client that people use, as its own documentation has it. The packages are not those of the other
tests, so these are skipped unless `make clients` runs them."""

import asyncio
import json
import os
import subprocess
import sys
from typing import Literal

import pytest

QUESTION = "What is the weather in Oslo? Use the tool."
TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "The current weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
                   "required": ["city"]}}}
MESSAGES = [{"role": "user", "content": QUESTION}]


def test_openai(tool_server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=tool_server.url + "/v1", api_key="x")
    name = client.models.list().data[0].id
    reply = client.chat.completions.create(
        model=name, messages=MESSAGES, tools=[TOOL], tool_choice="required", temperature=0, max_tokens=100)
    call = reply.choices[0].message.tool_calls[0]
    history = [*MESSAGES, reply.choices[0].message,
               {"role": "tool", "tool_call_id": call.id, "content": "-3 degrees, snow"}]
    reply = client.chat.completions.create(model=name, messages=history, tools=[TOOL], temperature=0, max_tokens=60)
    assert reply.choices[0].message.content
    with client.responses.stream(model=name, input="Say hello.", max_output_tokens=20) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")


def test_anthropic(tool_server):
    anthropic = pytest.importorskip("anthropic")
    client = anthropic.Anthropic(base_url=tool_server.url, api_key="x")
    tool = {"name": "get_weather", "description": "The current weather of a city",
            "input_schema": TOOL["function"]["parameters"]}
    n = client.messages.count_tokens(model="m", messages=MESSAGES, tools=[tool]).input_tokens
    assert n > 20
    message = client.messages.create(
        model="m", max_tokens=100, messages=MESSAGES, tools=[tool], tool_choice={"type": "any"})
    assert message.stop_reason == "tool_use"
    use = message.content[-1]
    assert use.name == "get_weather" and use.input["city"] in ("Oslo", "Rome")
    history = [*MESSAGES, {"role": "assistant", "content": message.content},
               {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "snow"}]}]
    with client.messages.stream(model="m", max_tokens=40, messages=history, tools=[tool]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.usage.output_tokens > 0
    assert text == "".join(block.text for block in final.content if block.type == "text")


def test_ollama(tool_server):
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=tool_server.url)
    name = client.list().models[0].model
    assert client.show(name).modelinfo
    parts = list(client.chat(name, [{"role": "user", "content": "Say hello."}], stream=True,
                             options={"num_predict": 12, "temperature": 0}))
    assert parts[-1].done and "".join(p.message.content for p in parts)
    reply = client.chat(name, MESSAGES, tools=[TOOL], options={"temperature": 0, "num_predict": 100})
    assert reply.message.tool_calls or reply.message.content
    shape = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    reply = client.chat(name, [{"role": "user", "content": "Ann is 31."}], format=shape, options={"num_predict": 60})
    assert isinstance(json.loads(reply.message.content)["age"], int)


def test_litellm(tool_server):
    litellm = pytest.importorskip("litellm")
    to = dict(model="openai/m", api_base=tool_server.url + "/v1", api_key="x")
    reply = litellm.completion(messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=100, **to)
    assert reply.choices[0].message.tool_calls[0].function.name == "get_weather"
    parts = list(litellm.completion(messages=[{"role": "user", "content": "Say hello."}], stream=True, max_tokens=12, **to))
    assert any(p.choices[0].delta.content for p in parts)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 30_000}], max_tokens=12, **to)


def test_langchain(tool_server):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=tool_server.url + "/v1", api_key="x", model="m", temperature=0, max_tokens=100)
    assert model.invoke("Say hello.").content
    assert "".join(part.content for part in model.stream("Say hello."))
    reply = model.bind_tools([TOOL], tool_choice="get_weather").invoke(QUESTION)
    assert reply.tool_calls[0]["name"] == "get_weather" and reply.tool_calls[0]["args"]["city"] in ("Oslo", "Rome")
    shape = {"title": "Person", "type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"],
             "additionalProperties": False}
    for method in ("json_schema", "function_calling"):
        person = model.with_structured_output(shape, method=method).invoke("Ann is 31 years old.")
        assert isinstance(person["age"], int), method


def test_instructor(tool_server):
    instructor = pytest.importorskip("instructor")
    import openai
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int
        mood: Literal["glad", "sad"]

    raw = openai.OpenAI(base_url=tool_server.url + "/v1", api_key="x")
    ask = dict(model="m", response_model=Person, temperature=0, max_tokens=150, max_retries=0,
               messages=[{"role": "user", "content": "Ann, 31, is glad."}])
    for client in (instructor.from_openai(raw), instructor.from_openai(raw, mode=instructor.Mode.JSON_SCHEMA)):
        assert client.chat.completions.create(**ask).mood in ("glad", "sad")


def test_pydantic_ai(tool_server):
    pytest.importorskip("pydantic_ai")
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Weather(BaseModel):
        city: Literal["Oslo", "Rome"]

    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=tool_server.url + "/v1", api_key="x"))
    settings = {"temperature": 0, "max_tokens": 200}
    # Its default asks for the answer as a call of a tool.
    for output in (Weather, NativeOutput(Weather)):
        agent = Agent(model, output_type=output, model_settings=settings)
        assert asyncio.run(agent.run("Which city is it: Oslo?")).output.city in ("Oslo", "Rome")


def test_llm(tool_server, tmp_path):
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: narrows\n  model_name: m\n  api_base: {tool_server.url}/v1\n  supports_tools: true\n  supports_schema: true\n")
    environment = dict(os.environ, LLM_USER_PATH=str(tmp_path), OPENAI_API_KEY="x")
    run = lambda *arguments: subprocess.run(
        [sys.executable, "-m", "llm", *arguments], env=environment, capture_output=True, text=True, timeout=200, check=True).stdout
    assert run("-m", "narrows", "Say hello.", "-o", "max_tokens", "12").strip()
    assert run("-m", "narrows", "-T", "llm_version", "Which version is it? Use the tool.", "-o", "max_tokens", "80").strip()
    shape = json.dumps({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
    assert isinstance(json.loads(run("-m", "narrows", "--schema", shape, "Ann is 31."))["age"], int)


def test_aider(tool_server, tmp_path):
    pytest.importorskip("aider")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "sum.py").write_text("def add(a, b):\n    return a - b\n")
    done = subprocess.run(
        [sys.executable, "-m", "aider", "--model", "openai/m", "--openai-api-base", tool_server.url + "/v1", "--openai-api-key", "x",
         "--no-auto-commits", "--yes-always", "--no-show-model-warnings", "--no-check-update", "--analytics-disable", "--no-pretty",
         "--edit-format", "whole", "--message", "What does add() in sum.py return? One sentence.", "sum.py"],
        cwd=tmp_path, env=dict(os.environ, HOME=str(tmp_path)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # aider counts both only when the server has answered.
    assert "Tokens:" in done.stdout and "received" in done.stdout, done.stdout
