"""What is read from and printed about a comparison with another server."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.bench import peers
from pdserve.bench.arrivals import BenchError
from pdserve.bench.peers_report import PAIRS, ratio, sentences, step_limit_ms, table


def test_workloads_are_written_with_their_concurrency() -> None:
    assert peers.Load.parse("256/64x8x48") == peers.Load(256, 64, 8, 48)
    for text in ("256/64", "256x64x8", "0/64x8x48", "a/bxcxd"):
        with pytest.raises(BenchError, match="IN/OUTxAT_ONCExREQUESTS"):
            peers.Load.parse(text)


def test_ratios_pair_the_rounds() -> None:
    rows = [
        {"round": number, "side": side, "workload": "w", "output tok/s": value, "TTFT p50": 1.0,
         "TPOT p50": 2.0}
        for number, side, value in [
            (0, "pdserve 1P+1D", 200.0), (0, "vLLM 1P1D", 100.0),
            (1, "pdserve 1P+1D", 300.0), (1, "vLLM 1P1D", 100.0), (2, "vLLM 1P1D", 7.0),
        ]
    ]  # fmt: skip
    pair = PAIRS[0]
    assert ratio(rows, pair, "output tok/s") == [2.0, 3.0]
    limits = {"pdserve 1P+1D": 0.5, "vLLM 1P1D": 0.5}
    text = table(rows, limits)
    assert "2.50 (2.00-3.00)" in text and text.count(" / vLLM") == 1
    assert "| 4.0 |" in text  # TPOT over the limit
    first, last = sentences(rows, limits)
    assert "2.50 times at w (first token 1.00)" in first and first.endswith("is reached.")
    assert "pdserve 1P+1D 0.50 ms" in last
    late = [{**row, "TTFT p50": 3.0} if row["side"] == pair.ours else row for row in rows]
    assert sentences(late, limits)[0].endswith("is missed.")


def test_the_limit_is_weights_over_bandwidth(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(1 << 20))
    small = step_limit_ms(tmp_path, 1)
    (tmp_path / "b.safetensors").write_bytes(bytes(99 << 20))
    assert 20 * small < step_limit_ms(tmp_path, 1)
    assert 0.001 < small < 10  # 0.1 to 1000 GB/s


def test_without_the_peer_it_says_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tmp_path), "--peers", str(tmp_path), "--out", str(tmp_path / "x")]
    assert peers.main(options) == 2
    assert "run bench/peers.sh first" in capsys.readouterr().err
