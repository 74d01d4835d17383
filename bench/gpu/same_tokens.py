"""The same greedy tokens from a disaggregated and a colocated cluster, one by one and all at once.

Starts each with --batch-invariant in bfloat16 and whatever options are given, and compares. The
last line says what came of it; exit code 1 if they differ.

    python -P bench/gpu/same_tokens.py --device=cuda --kv-cache-memory=4GiB
"""

from __future__ import annotations

import json
import random
import sys
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pdserve.bench.topology import NAME, Topology, up

PROMPTS, TOKENS, LARGEST_ID = 16, 32, 1000
TIMEOUT_S = 60.0


def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [rng.choices(range(10, LARGEST_ID), k=rng.randint(1, 300)) for _ in range(PROMPTS)]


def ask(url: str, prompt: Sequence[int]) -> list[int]:
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(  # noqa: S310 (our own server)
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return tokens


def main() -> None:
    found: dict[str, list[list[int]]] = {}
    for name in ("1P+1D", "1C"):
        topology = Topology.parse(name).options()
        options = ["--batch-invariant", "--dtype=bfloat16", "--disaggregate=always", *topology]
        options += sys.argv[1:]
        with up(options) as cluster, ThreadPoolExecutor(PROMPTS) as pool:
            found[f"{name}, one by one"] = [ask(cluster.url, prompt) for prompt in prompts()]
            together = pool.map(lambda prompt, url=cluster.url: ask(url, prompt), prompts())
            found[f"{name}, all at once"] = list(together)
    (first, expected), *others = found.items()
    different = [name for name, tokens in others if tokens != expected]
    if different:
        print(f"DIFFERENT tokens: {'; '.join(different)} against {first}")
        sys.exit(1)
    print(f"equal: {PROMPTS} prompts x {TOKENS} tokens, {'; '.join(found)}")


if __name__ == "__main__":
    main()
