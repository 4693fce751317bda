"""Rollouts on a GPU: greedy tokens equal the plain twin's and the CPU's, and samples do not depend on the batch."""

from __future__ import annotations

import threading
import zlib

import numpy as np
import pytest
import torch
from searchr1_kernels import linear_logprob
from trajectories import check_same

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import Decoder, DecoderConfig, KVCache, load_model
from searchr1_fast.models.lora import adapter_parameters, add_adapter
from searchr1_fast.offload import DeviceMemory
from searchr1_fast.packing import pack
from searchr1_fast.policy import to_device
from searchr1_fast.retrieval.device_rows import DeviceRows
from searchr1_fast.rollout import Engine, PlainEngine, RolloutRequest, SamplingParams, SearchLoop
from searchr1_fast.rollout.forward import Tokens, forward_in_parts
from searchr1_fast.types import Passage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = RolloutConfig(
    max_searches=2, max_turn_tokens=16, max_observation_tokens=60, max_sequence_tokens=160, max_num_seqs=9
)
GREEDY = SamplingParams(temperature=0.0)


def search(queries):
    """-> one passage that depends on the query alone."""
    return [[Passage("1", f"k{zlib.crc32(query.encode()) % 8}", "says b")] for query in queries]


@pytest.fixture
def requests(make_question):
    """-> six groups of three requests, each with one prompt."""
    questions = [make_question(index // 3) for index in range(18)]
    return [RolloutRequest(q, i // 3, f"{q.text}?", seed=i) for i, q in enumerate(questions)]


@pytest.fixture
def loop(tiny_model_directory, tiny_tokenizer):
    """device, sampling -> a loop over the pre-trained tiny model; with `lora_rank`, with a joined adapter as well."""

    def make(device, sampling=None, engine=Engine, dtype=torch.float32, lora_rank=0) -> SearchLoop:
        model = load_model(tiny_model_directory, dtype=dtype, device=device)
        if lora_rank:
            add_adapter(
                model, lora_rank, 2.0 * lora_rank, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), dtype
            )
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in adapter_parameters(model).values():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            model.requires_grad_(False).join_projections()
        return SearchLoop(engine(model, tiny_tokenizer, CONFIG, sampling), search)

    return make


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0), SamplingParams(0.8, top_p=0.9, top_k=20)])
def test_tokens_are_those_of_the_plain_twin_and_of_the_cpu(loop, requests, sampling):
    """In fp32, where a choice depends on the last digits once in a million tokens."""
    ours = loop("cuda", sampling).run(requests)
    assert sum(trajectory.num_searches for trajectory in ours) > 0
    check_same(ours, loop("cuda", sampling, PlainEngine).run(requests))
    check_same(ours, loop("cpu", sampling).run(requests))


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0)])
def test_an_adapter_generates_as_on_the_cpu(loop, requests, sampling):
    """Fused, and recorded as CUDA graphs; the changed adapter is read in place."""
    fused, plain = loop("cuda", sampling, lora_rank=4), loop("cpu", sampling, lora_rank=4)
    check_same(fused.run(requests), plain.run(requests))
    with torch.no_grad():
        for one in (fused, plain):
            for parameter in adapter_parameters(one.engine.model).values():
                parameter.mul_(1.5)
    check_same(fused.run(requests), plain.run(requests))


def test_samples_do_not_depend_on_the_batch(loop, requests):
    native = loop("cuda")
    together = native.run(requests)
    order = np.random.default_rng(0).permutation(len(requests))
    check_same([together[i] for i in order], native.run([requests[i] for i in order]))
    for place in (0, 7, 17):
        check_same([together[place]], native.run([requests[place]]))


def test_the_same_run_twice_has_the_same_bits(loop, requests):
    for dtype in (torch.float32, torch.bfloat16):
        native = loop("cuda", dtype=dtype)
        check_same(native.run(requests), native.run(requests), tolerance=0)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_the_sampler_saw_the_log_probabilities_that_the_trainer_computes(loop, requests, dtype, allowed):
    native = loop("cuda", dtype=dtype)
    trajectories = native.run(requests)
    model = native.engine.model
    for batch in pack(trajectories, [0.0] * len(trajectories), 1000):
        batch = to_device(batch, torch.device("cuda"))
        with torch.no_grad():
            hidden = model.scored_hidden(batch)
            logprobs = batch.spread(linear_logprob(hidden, model.head_weight, batch.scored_targets))
        difference = (logprobs - batch.rollout_logprobs).abs()
        assert float(difference.mean()) <= allowed / 5
        assert float(difference.quantile(0.99)) <= allowed


def test_the_cache_can_be_given_back(loop, requests):
    native = loop("cuda")
    first = native.run(requests)
    with_cache = torch.cuda.memory_allocated()
    native.engine.free_cache()
    assert torch.cuda.memory_allocated() < with_cache
    check_same(first, native.run(requests))


def test_graphs_follow_weights_that_come_back_elsewhere(loop, requests):
    """As with `model.offload.replica` and a cache that is kept.

    The memory where the weights were holds NaN by now, which a graph that still reads it would find.
    """
    native = loop("cuda")
    native.engine.keep_cache = True
    expected = native.run(requests)
    native.engine.free_cache()
    parameters = list(native.engine.model.parameters())
    weights = [parameter.detach().cpu() for parameter in parameters]
    addresses = [parameter.data_ptr() for parameter in parameters]
    memory = DeviceMemory(native.engine.model, beside=torch.nn.Identity())
    memory.release()
    others = [torch.full(weight.shape, torch.nan, device="cuda") for weight in weights]
    memory.restore()
    assert addresses != [parameter.data_ptr() for parameter in parameters] and len(others) == len(weights)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    check_same(expected, native.run(requests))
    assert native.statistics.num_recordings > 0


def test_steps_are_recorded_while_another_thread_uses_the_device(loop, requests):
    """The other thread searches without a pause, takes and pins memory, and waits.

    None of it gets into a recording or interrupts one. (What torch does not allow beside a recording is
    `torch.cuda.empty_cache`.)
    """
    native = loop("cuda")
    expected = native.run(requests)
    native.engine.free_cache()
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((5000, 64), np.float32).astype(np.float16)
    rows, queries = DeviceRows([(0, vectors)], "cuda"), generator.standard_normal((30, 64), np.float32)
    wanted, is_done, failures, num_searches = rows.search(queries, 16), threading.Event(), [], 0

    def search_on():
        nonlocal num_searches
        stream = torch.cuda.Stream()
        try:
            while not is_done.is_set():
                for one, other in zip(rows.search(queries, 16), wanted, strict=True):
                    np.testing.assert_array_equal(one, other)
                with torch.cuda.stream(stream):
                    taken = torch.full((int(generator.integers(1, 1 << 22)),), 7, device="cuda")
                    assert int(taken.sum()) == 7 * len(taken)
                    taken[:9].cpu().pin_memory()
                num_searches += 1
        except BaseException as failure:  # of the thread; raised below
            failures.append(failure)

    thread = threading.Thread(target=search_on)
    thread.start()
    try:
        for _ in range(3):
            check_same(expected, native.run(requests))
            assert native.statistics.num_recordings > 0
            native.engine.free_cache()
    finally:
        is_done.set()
        thread.join()
    if failures:
        raise failures[0]
    assert num_searches > 0


def test_a_pass_that_finds_no_memory_is_made_in_parts():
    """The allocator refuses. The memory of the failed pass is free again when the parts are computed."""
    shape = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 2}
    config = DecoderConfig(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=128)
    model = Decoder(config).to("cuda", torch.bfloat16).requires_grad_(False)
    lengths = np.array([1900, 1, 2000, 1500, 1])
    ends = torch.tensor([0, *np.cumsum(lengths)]).cuda()
    slots, starts = torch.arange(5).cuda(), torch.zeros(5, dtype=torch.int64).cuda()
    tokens = Tokens(torch.arange(lengths.sum()).cuda() % 64, ends, slots, starts, lengths)
    found, splits, (_, total) = [], [], torch.cuda.mem_get_info()
    for room in (None, 64 << 20):  # for all tokens the two gates alone take 84 MiB
        cache = KVCache(config, 5, 2048, torch.bfloat16, "cuda")
        torch.cuda.empty_cache()
        if room is not None:
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
        try:
            hidden = forward_in_parts(model, cache, tokens, lambda room=room: splits.append(room))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        found.append((hidden, *cache.keys, *cache.values))
    assert splits and set(splits) == {64 << 20}
    for one, other in zip(*found, strict=True):
        assert float((one.float() - other.float()).norm()) <= 0.01 * float(one.float().norm())


def test_a_step_that_finds_no_memory_for_its_logits_is_taken_all_the_same(tiny_tokenizer, requests):
    """Nine rows of a million logits are 36 MB. With 32 nothing is recorded, and logits are computed in parts."""
    shape = {"vocab_size": 1_000_000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = DecoderConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model = Decoder(config).to("cuda").requires_grad_(False)
    native = SearchLoop(Engine(model, tiny_tokenizer, CONFIG, SamplingParams(1.0)), search)
    expected = native.run(requests)
    assert native.statistics.num_splits == 0 < native.statistics.num_replayed_steps
    native.engine.free_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (32 << 20)) / total)
    try:
        found = native.run(requests)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    check_same(expected, found)
    assert native.statistics.num_splits > 0
