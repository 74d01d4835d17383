"""The runner beside greedy tokens: log-probabilities, sampling, the pool, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import Stepper, make_request
from transformers import AutoModelForCausalLM

from pdserve.engine import runner as runner_module
from pdserve.engine import sampler
from pdserve.engine.build import Built, resolve
from pdserve.engine.config import EngineConfig, ModelError, read_model_config
from pdserve.engine.graphs import ladder
from pdserve.engine.pool import NONCE_BYTES, KVPool, block_nbytes
from pdserve.engine.ports import Chunk, ChunkResult, Watcher
from pdserve.kernels import sampling

MakeModel = Callable[..., Path]
Build = Callable[..., Built]


def text(length: int, seed: int = 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 590, (length,), generator=generator).tolist()


def log_softmax(folder: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """transformers' log-probabilities after each token: [T, V] float32."""
    return model_logits(folder, token_ids).log_softmax(-1)


def model_logits(folder: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """transformers' logits after each token: [T, V] float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits
    return logits[0].float()


def check_logprobs(entry: Any, row: torch.Tensor, token_id: int, top: int) -> None:
    assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
    assert entry.rank == int((row > row[token_id]).sum()) + 1
    values, ids = row.topk(top)
    assert [token for token, _ in entry.top] == ids.tolist()
    assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("budget", [5, 1000])
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_logprobs_of_prompt_and_answer_as_transformers(
    budget: int,
    rows_at_once: int,
    make_model: MakeModel,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner_module, "LOGITS_BYTES", rows_at_once * 4 * 600)
    folder = make_model("qwen3")
    stepper = Stepper(build(folder))
    asking = stepper.add(text(23), logprobs=4, prompt_logprobs=3)
    other = stepper.add(text(9), logprobs=0)
    silent = stepper.add(text(11))
    stepper.run([asking, other, silent], 6, budget)
    rows = log_softmax(folder, asking.token_ids)
    prompt = [entry for result in stepper.results[asking] for entry in result.prompt_logprobs]
    assert len(prompt) == 22
    for position, entry in enumerate(prompt, 1):
        check_logprobs(entry, rows[position - 1], asking.token_ids[position], 3)
    answers = [result.logprobs for result in stepper.results[asking] if result.token_id is not None]
    assert len(answers) == 6
    for index, entry in enumerate(answers):
        check_logprobs(entry, rows[22 + index], asking.token_ids[23 + index], 4)
    rows = log_softmax(folder, other.token_ids)
    for index, result in enumerate(r for r in stepper.results[other] if r.token_id is not None):
        check_logprobs(result.logprobs, rows[8 + index], other.token_ids[9 + index], 0)
    assert all(result.logprobs is None for result in stepper.results[silent])


def test_logprobs_are_raw_whatever_shapes_the_draw(make_model: MakeModel, build: Build) -> None:
    folder = make_model("llama")
    stepper = Stepper(build(folder))
    request = stepper.add(
        text(10),
        logprobs=2,
        temperature=1.5,
        top_k=1,
        repetition_penalty=1.7,
        logit_bias={77: 100.0},
    )
    stepper.run([request], 1)
    assert request.token_ids[10:] == [77]
    (result,) = stepper.results[request]
    check_logprobs(result.logprobs, log_softmax(folder, request.token_ids)[9], 77, 2)


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits", "raw_logits"])
def test_logprobs_of_other_modes(make_model: MakeModel, build: Build, mode: str) -> None:
    folder = make_model("llama")
    stepper = Stepper(build(folder, logprobs_mode=mode))
    request = stepper.add(text(10), logprobs=3, temperature=0.5, logit_bias={77: 1.0}, seed=1)
    greedy = stepper.add(text(10), logprobs=3, logit_bias={77: 1.0})
    stepper.run([request, greedy], 1)
    row = model_logits(folder, text(10))[-1]
    if mode.startswith("processed"):
        row[77] += 1
    for one, temperature in ((request, 0.5), (greedy, 1.0)):
        shown = row / (temperature if mode.startswith("processed") else 1.0)
        if mode.endswith("logprobs"):
            shown = shown.log_softmax(-1)
        check_logprobs(stepper.results[one][0].logprobs, shown, one.token_ids[10], 3)


def test_what_is_told_of_filtered_draws_is_what_was_drawn_from() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 300) * 3
    wishes = [
        {"temperature": 0.3 + row / 20, "top_k": row % 5 * 7, "top_p": (1.0, 0.9, 0.4)[row % 3],
         "min_p": (0.0, 0.05)[row % 2]}
        for row in range(40)
    ]  # fmt: skip
    requests = [make_request([0], **wish) for wish in wishes]
    scores = sampler.processed(logits, requests)

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([wish[name] for wish in wishes], dtype=dtype)

    whole = logits / column("temperature", torch.float32).unsqueeze(1)
    least = sampling._thresholds(
        whole,
        column("top_k", torch.int64),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
    )
    assert torch.equal(scores > -math.inf, whole >= least.unsqueeze(1))


def test_seeded_answers_depend_on_nothing_but_the_request(
    make_model: MakeModel, build: Build
) -> None:
    """Not on the batch, the order, the chunks or the blocks."""
    built = build(make_model("mistral"))
    wishes: list[dict[str, Any]] = [
        {"seed": 1, "temperature": 1.0},
        {"seed": 2**64 - 1, "temperature": 0.8, "top_p": 0.9},
        {"seed": 3, "temperature": 1.3, "top_k": 20, "frequency_penalty": 0.5},
        {"seed": 4, "temperature": 1.0, "min_p": 0.02, "repetition_penalty": 1.2},
        {"seed": 5},
    ]
    stepper = Stepper(built)
    together = stepper.run([stepper.add(text(20), **wish) for wish in wishes], 15, budget=6)
    stepper = Stepper(built, seed=9)
    alone = [stepper.run([stepper.add(text(20), **wish)], 15)[0] for wish in wishes]
    assert alone == together
    assert len({tuple(answer) for answer in alone}) == len(wishes)


def test_a_request_goes_on_elsewhere_with_the_same_tokens(
    make_model: MakeModel, build: Build
) -> None:
    """Prompt and tokens so far, prefilled again in another pool, as after a preemption."""
    folder = make_model("llama")
    wish = {"seed": 11, "temperature": 1.0, "presence_penalty": 0.4}
    stepper = Stepper(build(folder))
    (whole,) = stepper.run([stepper.add(text(30), **wish)], 20)
    stepper = Stepper(build(folder, block_size=4, num_blocks=300), seed=4)
    moved = stepper.add(text(30), **wish)
    moved.token_ids += whole[:8]
    assert stepper.run([moved], 20, budget=17) == [whole]


def test_a_prompt_chunk_that_does_not_sample_brings_no_token(
    make_model: MakeModel, build: Build
) -> None:
    stepper = Stepper(build(make_model("llama")))
    request = stepper.add(text(10))
    stepper.step([request], 4)
    assert stepper.results[request] == [ChunkResult()]


def test_no_chunks_are_no_results(make_model: MakeModel, build: Build) -> None:
    assert build(make_model("llama")).runner.execute([]) == []


def test_warm_up_leaves_the_runner_as_it_was(make_model: MakeModel, build: Build) -> None:
    folder = make_model("llama")
    stepper = Stepper(build(folder))
    (cold,) = stepper.run([stepper.add(text(20))], 5)
    warm = build(folder)
    warm.runner.warm_up(warm.config.max_model_len)
    stepper = Stepper(warm)
    assert stepper.run([stepper.add(text(20))], 5) == [cold]


def draw(logits: torch.Tensor, *requests: Any) -> list[int]:
    return sampler.draw(logits.expand(len(requests), -1).clone(), requests)


def test_penalties_count_prompt_and_answer_as_documented() -> None:
    logits = torch.tensor([[5.0, 4.9, 4.0, -1.0]])
    prompt, output = [0], [1, 1]
    plain = make_request(prompt, output=output)
    repeated = make_request(prompt, output=output, repetition_penalty=1.3)
    present = make_request(prompt, output=output, presence_penalty=0.5)
    twice = make_request([1], output=[0, 0], presence_penalty=0.05, frequency_penalty=0.03)
    assert draw(logits, plain, repeated, present, twice) == [0, 2, 0, 1]
    # 0 is out twice: 5 - 0.05 - 2 · 0.03 = 4.89 < 4.9; the prompt's 1 is not penalised.
    once = make_request([1], output=[0], presence_penalty=0.05, frequency_penalty=0.03)
    assert draw(logits, once) == [0]


def test_a_repetition_penalty_moves_negative_logits_down_too() -> None:
    logits = torch.tensor([[-1.0, -1.5, -9.0]])
    assert draw(logits, make_request([0], repetition_penalty=1.4)) == [0]
    assert draw(logits, make_request([0], repetition_penalty=1.6)) == [1]


def test_ending_tokens_wait_for_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    ending: dict[str, Any] = {"eos_token_ids": (0, 4), "stop_token_ids": (1,), "min_tokens": 2}
    early = make_request([3], output=[3], **ending)
    ready = make_request([3], output=[3, 3], **ending)
    deaf = make_request([3], output=[3], ignore_eos=True, **ending)
    biased = make_request([3], output=[3], logit_bias={0: 100.0}, **ending)
    assert draw(logits, early, ready, deaf, biased) == [2, 0, 2, 2]


def test_biases_add_up_with_logits() -> None:
    logits = torch.tensor([[1.0, 0.0, -50.0]])
    assert draw(logits, make_request([0], logit_bias={2: 60.0, 0: -100.0})) == [2]
    assert draw(logits, make_request([0], logit_bias={1: 0.5})) == [0]


def test_greedy_and_random_rows_mix() -> None:
    logits = torch.zeros(1, 50)
    random = [make_request([1], seed=seed, temperature=1.0) for seed in range(5)]
    cold = make_request([1], temperature=1e-6)
    answers = draw(logits, random[0], cold, *random[1:])
    assert answers[1] == 0
    assert [answers[0], *answers[2:]] == draw(logits, *random)
    assert len(set(answers)) > 2


@pytest.fixture
def pool(make_model: MakeModel) -> KVPool:
    model = read_model_config(make_model("llama"))
    return KVPool(model, num_blocks=9, block_size=4, dtype="bfloat16", device="cpu")


def test_a_block_is_contiguous_and_holds_all_layers(pool: KVPool) -> None:
    assert pool.tensor.shape == (9, 2, 2, 4, 2, 16)
    assert pool.block_nbytes == 2 * 2 * 4 * 2 * 16 * 2
    assert pool.tensor.count_nonzero() == 0
    pool.layer(1)[7, 0, 3, 1, 15] = 1.5
    view = pool.view(7)
    assert (len(view), view.contiguous, view.readonly) == (pool.block_nbytes, True, False)
    assert bytes(view) == pool.tensor[7].view(torch.uint8).numpy().tobytes()
    view[:] = bytes(range(256)) * 4
    assert pool.tensor[7].view(torch.uint8).numpy().tobytes() == bytes(view)
    assert pool.tensor[6].count_nonzero() == pool.tensor[8].count_nonzero() == 0
    for block in (-1, 9):
        with pytest.raises(IndexError, match="is not in the pool of 9 blocks"):
            pool.view(block)
    del view
    pool.close()


def test_another_process_reads_the_blocks_and_the_nonce_behind_them(pool: KVPool) -> None:
    pool.tensor.fill_(1.0)
    pool.view(3)[:] = bytes([7]) * pool.block_nbytes
    code = (
        "import sys, mmap, os\n"
        "path, size = sys.argv[1], int(sys.argv[2])\n"
        "file = os.open(path, os.O_RDWR)\n"
        "memory = mmap.mmap(file, 0)\n"
        "sys.stdout.write(memory[3 * size : 4 * size].hex() + ' ' + memory[9 * size :].hex())\n"
        "memory[4 * size : 5 * size] = bytes([9]) * size\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, pool.path, str(pool.block_nbytes)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    block, nonce = child.stdout.split()
    assert bytes.fromhex(block) == bytes([7]) * pool.block_nbytes
    assert bytes.fromhex(nonce) == pool.nonce
    assert len(pool.nonce) == NONCE_BYTES
    assert bytes(pool.view(4)) == bytes([9]) * pool.block_nbytes
    pool.close()


def memory_maps() -> str:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return "\n".join(line for line in lines if "memfd:pdserve-kv" in line)


def test_closing_gives_descriptor_and_memory_back(pool: KVPool) -> None:
    path = pool.path
    inode = f" {os.stat(path).st_ino} "
    assert inode in memory_maps()
    pool.close()
    pool.close()
    assert not os.path.exists(path)
    assert pool.path == ""
    assert inode not in memory_maps()


def test_memory_is_committed_only_when_written(make_model: MakeModel) -> None:
    model = read_model_config(make_model("llama"))
    pool = KVPool(model, num_blocks=1 << 20, block_size=16, dtype="float32", device="cpu")
    assert pool.num_blocks * pool.block_nbytes == 8 << 30
    pool.tensor[-1].fill_(1.0)
    used = os.stat(pool.path).st_blocks * 512
    assert used < 1 << 20
    pool.close()


def test_a_pool_too_small_for_one_request_is_refused(make_model: MakeModel, build: Build) -> None:
    folder = make_model("llama")
    options = {"num_blocks": 0, "max_model_len": 100, "block_size": 16}
    needed = 7 * 16 * 2 * 2 * 2 * 16 * 4
    sentence = (
        "room for 96 tokens, less than one request of 100: raise --kv-cache-memory to at least "
        f"{needed} bytes .*or lower --max-model-len"
    )
    with pytest.raises(ModelError, match=sentence):
        build(folder, kv_cache_memory=needed - 1, **options)
    assert build(folder, kv_cache_memory=needed, **options).pool.num_blocks == 7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_model_len": 9000}, r"--max-model-len \(9000\) is above the model's 8192 positions"),
        (
            {"dtype": "int8"},
            "--dtype must be auto or one of float32, bfloat16, float16, not 'int8'",
        ),
        ({"device": "tpu"}, "--device must be auto, cpu or cuda, not 'tpu'"),
        ({"load_format": "gguf"}, "--load-format must be auto or dummy, not 'gguf'"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(
    options: dict[str, Any], sentence: str, make_model: MakeModel, build: Build
) -> None:
    with pytest.raises(ModelError, match=sentence):
        build(make_model("llama"), **options)


def test_automatic_settings_are_resolved(make_model: MakeModel, build: Build) -> None:
    folder = make_model("llama", dtype="bfloat16")
    options = {"max_model_len": 0, "num_blocks": 0, "kv_cache_memory": 16 << 20}
    built = build(folder, dtype="auto", device="cpu", **options)
    assert built.config.dtype == "bfloat16"
    assert built.config.max_model_len == 8192
    assert built.config.num_blocks == (16 << 20) // (16 * 2 * 2 * 2 * 16 * 2)
    assert built.pool.tensor.dtype == torch.bfloat16


def test_fingerprints_tell_pools_apart_that_must_not_mix(
    make_model: MakeModel, build: Build
) -> None:
    one = build(make_model("llama")).fingerprint
    assert build(make_model("llama")).fingerprint.difference(one) is None
    for built, field in [
        (build(make_model("llama"), block_size=8), "block_size"),
        (build(make_model("llama"), dtype="bfloat16"), "dtype"),
        (build(make_model("llama", rms_norm_eps=0.1)), "model"),
        (build(make_model("llama"), load_format="dummy"), "weights"),
    ]:
        assert f"differ in {field}" in str(built.fingerprint.difference(one))


@pytest.mark.parametrize("largest", [1, 3, 8, 64, 100, 256])
def test_the_ladder_of_recordings_ends_at_the_largest_batch(largest: int) -> None:
    sizes = ladder(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1 and sizes[-1] == largest
    for count in range(1, largest + 1):  # padding at most doubles a step
        assert next(size for size in sizes if size >= count) <= max(2 * count, count + 31)


@pytest.mark.parametrize("in_one_call", [False, True])
def test_recorded_steps_with_padding_give_the_same_tokens_and_touch_no_other_block(
    in_one_call: bool, make_model: MakeModel, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording is played by running it again: the tensors and the padding are the same as on
    a GPU."""
    replayed: list[int] = []

    def capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def replay() -> torch.Tensor:
            result = step()
            replayed.append(result.shape[0])
            return result

        return replay

    built = build(make_model("qwen3"))
    if not in_one_call:  # the CPU's step in C, or kernel by kernel, as on a GPU
        monkeypatch.setattr(built.runner._decoder, "decode", None)
    expected_stepper = Stepper(built)
    inputs = [text(length, seed=length) for length in (3, 20, 37)]
    expected = expected_stepper.run([expected_stepper.add(prompt) for prompt in inputs], 8)
    built.pool.tensor.zero_()
    built.runner.record(4, 256, capture)
    stepper = Stepper(built)
    requests = [stepper.add(prompt) for prompt in inputs]
    assert stepper.run(requests, 8) == expected
    assert replayed == [4] * 7  # three tokens a step, one row of padding
    used = {block for request in requests for block in request.block_table}
    unused = [block for block in range(built.pool.num_blocks) if block not in used]
    assert built.pool.tensor[unused].count_nonzero() == 0


def test_no_kv_memory_given_means_a_gibibyte_on_the_cpu(make_model: MakeModel) -> None:
    model = read_model_config(make_model("llama"))
    config = resolve(EngineConfig(device="cpu"), model)
    assert config.num_blocks == (1 << 30) // block_nbytes(model, 16, "float32")


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_that_the_watcher_hears_of_are_complete(
    slices: int, make_model: MakeModel, build: Build
) -> None:
    """Their bytes do not change any more in this step, and later ones are not there yet."""
    built = build(make_model("llama", "tiny"))
    stepper = Stepper(built)
    first, second = stepper.add(text(37)), stepper.add(text(20, seed=4))
    pool = built.pool.tensor
    seen: list[tuple[int, torch.Tensor]] = []

    def tell(done: int, computed: Callable[[], None] | None) -> None:
        assert computed is None, "a CPU has computed what it was told to"
        seen.append((done, pool.clone()))

    watcher = Watcher(slices, tell)
    stepper.run([first], 3)
    built.runner.execute(
        [
            Chunk(first, first.num_computed, 1, samples=True),
            Chunk(second, 0, 20, samples=True),
        ],
        watcher,
    )
    assert [done for done, _ in seen] == list(range(1, slices))
    blocks, layers = second.block_table[:2], pool.shape[1] // slices
    for done, then in seen:
        assert torch.equal(then[:, : done * layers], pool[:, : done * layers])
        assert not then[blocks][:, done * layers :].any()
    assert pool[blocks].any(dim=-1).any(dim=-1)[..., :4].all()


def test_logits_that_are_not_numbers_are_seen_by_who_looks(
    make_model: MakeModel, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("llama")
    for looks in (True, False):
        built = build(folder, compute_nans_in_logits=looks)
        stepper = Stepper(built)
        logits = built.runner._decoder.logits

        def spoilt(hidden: torch.Tensor, logits: Any = logits) -> torch.Tensor:
            found: torch.Tensor = logits(hidden).clone()
            found[0, 7] = float("nan")
            found[-1, 8] = float("-inf")
            return found

        requests = [stepper.add(text(5)), stepper.add(text(6))]
        stepper.run(requests, 1, 100)
        assert not any(one.corrupted for each in stepper.results.values() for one in each)
        monkeypatch.setattr(built.runner._decoder, "logits", spoilt)
        stepper.run(requests, 2, 100)
        seen = [stepper.results[request][-1].corrupted for request in requests]
        assert seen == [looks, False]
