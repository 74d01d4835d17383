"""What goes wrong on the way in: every answer is an error object that names what to change."""

from __future__ import annotations

import gzip
import http.client
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import OpenAI
from router_harness import RouterHarness

from pdserve.cluster.records import Role

HI: list[Any] = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}

Start = Callable[..., RouterHarness]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    """The error object of an answer, checked for its shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"), ("temperature", 3.0), ("top_p", 0), ("top_k", -2), ("n", 0),
        ("messages", None), ("messages", []), ("messages", "Hi"), ("messages", [5]),
        ("stop", ["a", "b", "c", "d", "e"]), ("max_tokens", 0), ("max_completion_tokens", 10**9),
        ("max_tokens", 10**30), ("top_logprobs", 3), ("logprobs", "many"), ("seed", 2**70),
        ("tools", []), ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"), ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}), ("structured_outputs", {"choice": []}),
        ("guided_json", {}), ("use_beam_search", True), ("bad_words", [""]),
        ("allowed_token_ids", []), ("logprob_token_ids", [1]),
        ("repetition_detection", {"max_pattern_size": 3, "min_count": 1}),
        ("kv_transfer_params", {}), ("vllm_xargs", {"a": 1}),
        ("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"chat_template": "x"}),
        ("stream_interval", 0), ("stream_options", {"include_usage": True}),
        ("reasoning_effort", "huge"), ("mm_processor_kwargs", {"a": 1}), ("modalities", ["audio"]),
        ("continue_final_message", True), ("logit_bias", {"a": 1}), ("truncation_side", "up"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(harness: RouterHarness, field: str, value: Any) -> None:
    answer = harness.client.post(CHAT, json={"messages": HI, field: value})
    error = error_of(answer, 400)
    assert field in error["param"] + error["message"]
    assert error["param"] and error["type"] in ("BadRequestError", "Bad Request")


def test_top_logprobs_has_a_limit(harness: RouterHarness) -> None:
    body = {"messages": HI, "logprobs": True, "top_logprobs": 21}
    assert error_of(harness.client.post(CHAT, json=body), 400)["param"] == "top_logprobs"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"{bad json", "json_invalid"),
        (b"", "json_invalid"),
        (b'{"messages": [' * 100, "json_invalid"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "json_invalid"),
        (b"[" * 10_000 + b"]" * 10_000, "json_invalid"),
        (b'{"messages": NaN}', "json_invalid"),
        (b'{"temperature": 1e999, "messages": []}', "json_invalid"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "json_invalid"),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "json_invalid"),
        (b"[]", "validation error"),
        (b'"text"', "validation error"),
        (b"null", "validation error"),
        (b'{"messages": [' + b'{"role": "user", "content": {"a":' * 900, "json_invalid"),
    ],
)
def test_malformed_bodies(harness: RouterHarness, body: bytes, text: str) -> None:
    error = error_of(harness.client.post(CHAT, content=body, headers=JSON), 400)
    assert text in error["message"] and len(error["message"]) < 5000


def test_deep_values_that_are_legal_json(harness: RouterHarness) -> None:
    """Nesting that the parser takes must not hurt what comes after it."""
    deep: Any = "x"
    for _ in range(300):
        deep = {"a": deep}
    for field in ("metadata", "chat_template_kwargs"):
        answer = harness.client.post(CHAT, json={"messages": HI, field: {"x": deep}})
        assert answer.status_code == 200, answer.text
    error_of(harness.client.post(CHAT, json={"messages": deep}), 400)


def test_only_json_is_taken(harness: RouterHarness) -> None:
    body = json.dumps({"messages": HI}).encode()
    for headers in ({"content-type": "text/plain"}, {}):
        answer = harness.client.post(CHAT, content=body, headers=headers)
        assert "Unsupported Media Type" in error_of(answer, 400)["message"]
    with_charset = {"content-type": "application/json; charset=utf-8"}
    assert harness.client.post(CHAT, content=body, headers=with_charset).status_code == 200
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = harness.client.post(CHAT, content=gzip.compress(body), headers=packed)
    assert "must not be compressed" in error_of(answer, 415)["message"]


def test_routes_that_are_not_there(harness: RouterHarness) -> None:
    assert error_of(harness.client.get("/v1/nothing"), 404)["type"] == "NotFoundError"
    assert error_of(harness.client.get(CHAT), 405)["type"] == "Method Not Allowed"
    assert harness.client.head("/health").status_code == 405


def test_models(client: OpenAI, harness: RouterHarness) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["demo", "org/name"]
    assert client.models.retrieve("org/name") == listed[1]
    answer = harness.client.get("/v1/models/org%2Fname")
    assert answer.json()["id"] == "org/name" and answer.json()["max_model_len"] == 4096
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("missing")
    assert caught.value.param == "model"
    reply = client.chat.completions.create(model="org/name", messages=HI)
    assert reply.model == "demo"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=HI)


def test_request_ids(harness: RouterHarness) -> None:
    given = {"x-request-id": "abc-1"}
    for _ in range(2):
        answer = harness.client.post(CHAT, json={"messages": HI}, headers=given)
        assert answer.headers["x-request-id"] == "abc-1"
        assert answer.json()["id"] == "chatcmpl-abc-1"
    for worker in harness.workers:
        last = [submit.request_id for submit in worker.submits[-2:]]
        assert len(set(last)) == 2 and all("chatcmpl-abc-1" in name for name in last)
    if len(harness.workers) == 2:
        assert len({worker.submits[-1].request_id for worker in harness.workers}) == 1
    named = harness.client.post(CHAT, json={"messages": HI, "request_id": "mine"})
    assert named.json()["id"] == "chatcmpl-mine"
    odd = harness.client.get("/version", headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"] != "a b"


def test_pages_and_numbers(harness: RouterHarness) -> None:
    assert harness.client.get("/health").content == b""
    assert harness.client.get("/ping").status_code == 200
    assert harness.client.post("/ping").status_code == 200
    assert isinstance(harness.client.get("/version").json()["version"], str)
    assert harness.client.get("/load").json() == {"server_load": 0}
    assert "swagger" in harness.client.get("/docs").text.lower()
    document = harness.client.get("/openapi.json").json()
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    assert "messages" in document["components"]["schemas"][name]["properties"]
    moved = harness.client.get("/v1/models/", follow_redirects=False)
    assert moved.status_code == 307 and moved.headers["location"].endswith("/v1/models")


def test_the_load_comes_with_answers_if_asked_for(harness: RouterHarness) -> None:
    def report(wanted: str) -> str | None:
        headers = {"endpoint-load-metrics-format": wanted}
        answer = harness.client.post(CHAT, json={"messages": HI}, headers=headers)
        assert answer.status_code == 200
        found: str | None = answer.headers.get("endpoint-load-metrics")
        return found

    assert report("XML") is None
    text, content = report("TEXT"), report("JSON")
    assert text is not None and content is not None
    values = dict(one.split("=") for one in text.removeprefix("TEXT ").split(", "))
    assert set(values) == {
        "named_metrics.num_requests_waiting", "named_metrics.kv_cache_usage_perc",
    }  # fmt: skip
    named = json.loads(content.removeprefix("JSON "))["named_metrics"]
    assert named["num_requests_waiting"] == float(values["named_metrics.num_requests_waiting"])
    assert 0 <= named["kv_cache_usage_perc"] <= 1


def test_metrics_count(harness: RouterHarness) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[str, float]:
        answer = harness.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        found = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                names = ("finished_reason", "kind", "handler", "source", "outcome", "method")
                labels = [sample.labels.get(name, "") for name in names]
                found["/".join(filter(None, [sample.name, *labels]))] = sample.value
        return found

    before = read()
    sent = harness.client.post(CHAT, json={"messages": HI, "max_tokens": 3})
    answer = sent.json()
    harness.until_idle()
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("vllm:request_success_total/length") == 1
    assert grown("vllm:prefix_cache_hits_total") == 3  # as the workers of these tests say
    assert grown("vllm:prefix_cache_queries_total") == answer["usage"]["prompt_tokens"]
    assert grown("vllm:request_inference_time_seconds_count") == 1
    assert grown("vllm:request_max_num_generation_tokens_sum") == 3
    assert grown("vllm:request_prefill_kv_computed_tokens_sum") == (
        answer["usage"]["prompt_tokens"] - 3
    )
    assert (
        after["vllm:time_per_output_token_seconds_count"]
        == (after["vllm:inter_token_latency_seconds_count"])
    )
    assert grown("vllm:prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert grown("vllm:generation_tokens_total") == 3
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:e2e_request_latency_seconds_count") == 1
    kind = "prefill" if len(harness.workers) == 2 else "full"
    assert grown(f"pdserve:phase_seconds_count/{kind}") >= 1
    assert grown(f"http_request_size_bytes_sum/{CHAT}") == int(
        sent.request.headers["content-length"]
    )
    assert grown(f"http_response_size_bytes_sum/{CHAT}") == len(sent.content)
    assert grown(f"http_requests_total/{CHAT}/POST") == 1
    fetched = answer["usage"]["prompt_tokens"] if kind == "prefill" else 0
    assert grown("vllm:external_prefix_cache_hits_total") == fetched
    assert grown("vllm:prompt_tokens_by_source_total/external_kv_transfer") == fetched
    assert grown("vllm:prompt_tokens_recomputed_total") == 0
    assert after["vllm:num_requests_running"] == after["pdserve:answers_in_flight"] == 0
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1


# routers of their own


def test_keys(start: Start) -> None:
    harness = start(api_key=("first", "second"))
    harness.add(Role.COLOCATED)
    harness.until_connected()
    get = harness.client.get
    for path in ("/v1/models", "/v1/unknown", "/v2/x", "/inference/x"):
        refused = get(path)
        assert refused.status_code == 401 and refused.content == b'{"error":"Unauthorized"}'
        assert "www-authenticate" not in refused.headers
    for value in ("Bearer wrong", "Basic first", "first", "Bearer", "Bearer first second"):
        assert get("/v1/models", headers={"authorization": value}).status_code == 401
    for value in ("Bearer first", "bearer second", "BEARER first"):
        assert get("/v1/models", headers={"authorization": value}).status_code == 200
    for path in ("/health", "/metrics", "/version", "/ping", "/docs"):
        assert get(path).status_code == 200
    preflight = {"origin": "https://a", "access-control-request-method": "POST"}
    refused = harness.client.options(CHAT, headers=preflight)
    assert refused.status_code == 400 and refused.text == "Disallowed CORS origin"
    with OpenAI(base_url=f"{harness.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_browsers_of_named_origins(start: Start) -> None:
    harness = start(allowed_origins=("https://a",))
    preflight = {"origin": "https://a", "access-control-request-method": "POST"}
    allowed = harness.client.options(CHAT, headers=preflight)
    assert allowed.headers["access-control-allow-origin"] == "https://a"
    other = harness.client.options(CHAT, headers=preflight | {"origin": "https://b"})
    assert other.status_code == 400


def test_bodies_have_a_limit(start: Start) -> None:
    harness = start(max_body=10_000)
    harness.add(Role.COLOCATED)
    harness.until_connected()
    long = json.dumps({"messages": [{"role": "user", "content": "x" * 20_000}]}).encode()
    error_of(harness.client.post(CHAT, content=long, headers=JSON), 413)

    def pieces() -> Any:
        for start_at in range(0, len(long), 1000):
            yield long[start_at : start_at + 1000]

    error_of(harness.client.post(CHAT, content=pieces(), headers=JSON), 413)
    fitting = json.dumps({"messages": [{"role": "user", "content": "x" * 900}]}).encode()
    answer = harness.client.post(CHAT, content=iter([fitting[:40], fitting[40:]]), headers=JSON)
    assert answer.status_code == 200


def test_twenty_megabytes_are_refused_by_their_length(start: Start) -> None:
    harness = start()
    harness.add(Role.COLOCATED)
    harness.until_connected()
    body = {"messages": [{"role": "user", "content": "x" * 20_000_000}]}
    error = error_of(harness.client.post(CHAT, json=body), 400)
    assert "maximum context length" in error["message"]


def test_templates_of_requests(start: Start) -> None:
    harness = start(trust_request_chat_template=True)
    worker = harness.add(Role.COLOCATED)
    harness.until_connected()
    ok = {"messages": HI, "chat_template": "{{ messages[0].content }}!"}
    assert harness.client.post(CHAT, json=ok).status_code == 200
    text = harness.router.model.tokenizer.core.decode(worker.submits[-1].prompt_token_ids)
    assert text == "Hi!"
    for template in ("{% for %}", "{{ raise_exception('never') }}", "{{ 1 / 0 }}"):
        answer = harness.client.post(CHAT, json={"messages": HI, "chat_template": template})
        error_of(answer, 400)


def test_a_template_that_fails_and_one_from_the_command_line(start: Start) -> None:
    harness = start(chat_template="{{ raise_exception('I refuse') }}")
    harness.add(Role.COLOCATED)
    harness.until_connected()
    error = error_of(harness.client.post(CHAT, json={"messages": HI}), 400)
    assert "I refuse" in error["message"] and error["param"] == "messages"


def test_connections_live_on_after_errors(harness: RouterHarness) -> None:
    address = harness.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        for body, status in ((b"{bad", 400), (b"[]", 400), (None, 200)):
            content = json.dumps({"messages": HI}).encode() if body is None else body
            connection.request("POST", CHAT, content, JSON)
            reply = connection.getresponse()
            assert reply.status == status and reply.read()
    finally:
        connection.close()


def test_the_tokenizer_is_shown_only_if_the_operator_wants(start: Start) -> None:
    error_of(start().client.get("/tokenizer_info"), 404)
    found = start(enable_tokenizer_info_endpoint=True).client.get("/tokenizer_info").json()
    assert found["tokenizer_class"]
    assert "<|im_start|>" in found["chat_template"]
    replaced = start(enable_tokenizer_info_endpoint=True, chat_template="{{ 'mine' }}")
    assert replaced.client.get("/tokenizer_info").json()["chat_template"] == "{{ 'mine' }}"
