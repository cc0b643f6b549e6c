"""The official client, end to end."""

import json

import openai
import pytest


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


# docs/server_api.md: "The OpenAI clients work with"; "requests may call it what they like"
def test_models(client):
    assert client.models.list().data[0].object == "model"


def test_chat(client):
    reply = client.chat.completions.create(model="any", messages=MESSAGES, temperature=0, max_tokens=20)
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens > 10
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_streaming(client):
    stream = client.chat.completions.create(model="any", messages=MESSAGES, temperature=0, max_tokens=20, stream=True,
                                            stream_options={"include_usage": True})
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
    assert "Paris" in text
    assert usage.completion_tokens > 0


def test_completion(client):
    reply = client.completions.create(model="any", prompt="The capital of France is", temperature=0, max_tokens=5, logprobs=1)
    assert "Paris" in reply.choices[0].text
    assert len(reply.choices[0].logprobs.tokens) == 5


def test_logprobs(client):
    reply = client.chat.completions.create(model="any", messages=MESSAGES, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    assert len(content[0].top_logprobs) == 2
    assert content[0].logprob <= 0


def test_schema(client):
    reply = client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": "Invent a person."}], temperature=0.7, seed=1, max_tokens=150,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": {
            "type": "object", "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer", "maximum": 150, "minimum": 0}},
            "required": ["name", "age"], "additionalProperties": False}}})
    person = json.loads(reply.choices[0].message.content)
    assert isinstance(person["name"], str) and 0 <= person["age"] <= 150


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="any", messages=MESSAGES, temperature=-1)
    assert e.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "word " * 9000}])
    assert e.value.type == "exceed_context_size_error"
    assert e.value.body["n_ctx"] == 8192
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "word " * 9000}], stream=True)


def test_keys(start, tmp_path):
    (tmp_path / "keys").write_text("sk-right\n")
    server = start("--api-key-file", str(tmp_path / "keys"))
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="sk-wrong", max_retries=0).models.list()
    assert openai.OpenAI(base_url=server.url + "/v1", api_key="sk-right", max_retries=0).models.list().data
