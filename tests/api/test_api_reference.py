"""The API reference: every route that takes a body shows one, and what it shows works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from router_harness import RouterHarness

from pdserve.cluster.records import Role

Start = Callable[..., RouterHarness]


def operations(harness: RouterHarness) -> list[tuple[str, dict[str, Any]]]:
    document = harness.client.get("/openapi.json").json()
    return [
        (path, methods["post"]["requestBody"]["content"]["application/json"])
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {})
    ]


def test_every_example_of_the_reference_is_answered(start: Start) -> None:
    harness = start(enable_scale_out=True)
    harness.add(Role.PREFILL)
    harness.add(Role.DECODE)
    harness.until_connected()
    found = operations(harness)
    assert len(found) >= 12
    for path, content in found:
        schema = content["schema"]
        kinds = {one["$ref"].rpartition("/")[2] for one in schema.get("anyOf", [schema])}
        assert set(content["examples"]) == kinds, f"{path} shows no example of a body"
        for name, example in content["examples"].items():
            answer = harness.client.post(path, json=example["value"])
            assert answer.status_code == 200, f"{path}, {name}: {answer.text}"
    harness.until_idle()


@pytest.mark.filterwarnings("ignore:The `root_path` parameter is deprecated")
@pytest.mark.parametrize("root", ["", "/behind"])
def test_the_pages_need_no_other_host(start: Start, root: str) -> None:
    harness = start(enable_offline_docs=True, root_path=root)
    for page, count in (("/docs", 3), ("/redoc", 2)):
        text = harness.client.get(page).text
        assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", text)
        loaded = re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
        assert len(loaded) == count and all(one.startswith(root + "/") for one in loaded)
        for one in loaded:
            answer = harness.client.get(one.removeprefix(root))
            assert answer.status_code == 200 and len(answer.content) > 500
        assert f"{root}/openapi.json" in text
    assert harness.client.get("/docs/assets/../app.py").status_code == 404
    assert harness.client.get("/docs/assets/%2e%2e/core.py").status_code == 404
