"""What a GPU would be asked to do at published shapes, tested without one.

All of the host's code runs, on tensors that have shapes and claim to be on a GPU; no kernel runs. Nothing may therefore
ask for a value, for which a GPU would have to wait, and every launch must fit its kernel and CUDA's limits. What Triton
would compile for it is then compiled for Hopper, and must spill nothing and fit. A kernel must not be compiled again
for another number of rows: that would happen in the middle of a step, and the new one may round differently."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from searchr1_kernels import PolicyLoss
from searchr1_kernels._objective_operator import arguments
from searchr1_kernels.policy_objective import PolicyRows

from searchr1_fast.models import Decoder, KVCache
from searchr1_fast.models.lora import add_adapter
from searchr1_fast.models.published import published_config
from searchr1_fast.packing import pack
from searchr1_fast.policy import to_device
from searchr1_fast.rollout.decode_graph import _decode_step
from searchr1_fast.rollout.sampling import SamplingParams, head_logits, sample

pytest.importorskip("triton", reason="needs Triton")
LiveBytes = importlib.import_module("live_bytes").LiveBytes
_gae_triton = importlib.import_module("searchr1_kernels._gae_triton")
recording = importlib.import_module("launch_recording")
GPU, META, tensor, places = recording.GPU, recording.META, recording.tensor, recording.places

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = ["normalise", "rotate_and_write", "attend", "combine", "normalise", "multiply"]


def build(name: str, dtype: torch.dtype, lora_rank: int = 0) -> tuple[Decoder, KVCache]:
    """-> two layers of a published shape, and a cache for 256 sequences."""
    config = replace(published_config(name), num_hidden_layers=2)
    with META:
        model = Decoder(config).to(dtype)
    if lora_rank:
        add_adapter(model, lora_rank, 32.0, ADAPTED, dtype)
    model.requires_grad_(False).join_projections()
    return model, KVCache(config, 257, 4096, dtype, META, num_blocks=9000)


@pytest.mark.parametrize("lora_rank", [0, 16])
@pytest.mark.parametrize("name", ["qwen2.5-3b", "qwen2.5-7b", "llama-3.2-3b", "qwen3-4b"])
def test_a_decode_step(launches, name, lora_rank):
    model, cache = build(name, torch.bfloat16, lora_rank)
    for rows in (256, 5, 1):
        inputs = [*(places(rows) for _ in range(4)), tensor(rows, dtype=torch.float64)]
        outputs = tensor(2 * rows, dtype=torch.int32)
        for params, drawn in (
            (SamplingParams(), ["summarise", "draw"]),
            (SamplingParams(0.8, top_p=0.9, top_k=20), ["summarise", "bound", "collect", "choose"]),
        ):
            launches.clear()
            _decode_step(model, cache, places(257), inputs, outputs, params)()
            assert launches == [*LAYER, *LAYER, "normalise", *drawn]


def test_a_step_in_which_sequences_join(launches):
    """Lone tokens go in parts, the others in tiles; the last layer ends with only the last token of each sequence."""
    model, cache = build("qwen2.5-3b", torch.bfloat16)
    lengths = np.array([700, 1, 1, 90, 1])
    cache.set_table(places(3), places(3), places(3))
    cache.copy(places(3), places(3), places(3))
    hidden = model.forward_cached(places(lengths.sum()), places(6), places(5), places(5), cache, lengths)
    assert hidden.shape == (5, model.config.hidden_size)
    layer = [*LAYER[:4], "attend", *LAYER[4:]]
    assert launches == [*layer, *layer, "normalise"]
    sample(head_logits(hidden, model.head_weight), tensor(5, dtype=torch.float64), SamplingParams())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("lora_rank", [0, 16])
def test_an_update_up_to_the_head(launches, make_trajectory, lora_rank, checkpointing):
    """Forward and backward, for sequences that share a prefix: no launch of ours, and no wait."""
    trajectories = [make_trajectory(seed, [(False, 30), (True, 9 + seed), (False, 70)]) for seed in range(4)]
    for trajectory in trajectories[1:]:
        trajectory.token_ids[:35] = trajectories[0].token_ids[:35]
    (batch,) = pack(trajectories, [1.0] * 4, 1000)
    batch = to_device(batch, GPU)
    assert batch.prefixes.key_index.is_cuda and batch.token_ids.is_cuda
    config = replace(published_config("qwen2.5-3b"), num_hidden_layers=2)
    with META:
        model = Decoder(config).to(torch.bfloat16)
    if lora_rank:
        add_adapter(model, lora_rank, 32.0, ADAPTED, torch.bfloat16)
    model.checkpoint_blocks(checkpointing)
    with torch.enable_grad():
        hidden = model.scored_hidden(batch)
        hidden.float().sum().backward()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert hidden.shape[0] == len(batch.scored_rows) and not launches
    assert len(learned) == (2 * 2 * len(ADAPTED) if lora_rank else len(list(model.parameters())))
    assert all((p.grad is None) == (p is model.lm_head.weight and not config.tie_word_embeddings) for p in learned)


@pytest.mark.parametrize(
    ("rows", "size", "vocabulary"), [(16_384, 2048, 151_936), (8192, 3584, 152_064), (1, 896, 151_936)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_head(launches, dtype, rows, size, vocabulary):
    """Scores, with and without what a backward pass needs, and both ways to gradients."""
    logprob, policy = (
        importlib.import_module(f"searchr1_kernels.linear_{name}") for name in ("logprob", "policy_loss")
    )
    sides = tensor(rows, size, dtype=dtype), tensor(vocabulary, size, dtype=dtype), places(rows)
    logprob._forward(*sides, 1.0, None, True, False)
    without_logits = ["scan_vocabulary", "target_logits", "merge_spans"]
    assert (launches == without_logits) == (dtype != torch.float32)
    *scores, saved = logprob._forward(*sides, 0.7, None, True, True)
    for by_entropy in (None, tensor(rows)):
        launches.clear()
        gradients = logprob._backward(tensor(rows), by_entropy, *sides, scores[1], saved, 0.7, None, True, True)
        assert [(g.shape, g.dtype) for g in gradients] == [(side.shape, dtype) for side in sides[:2]]
        own = "differentiate_products" if dtype == torch.bfloat16 else "differentiate_rows"
        assert set(launches) == {own}
    for coefficient in (0.0, 0.01):
        launches.clear()
        loss = PolicyLoss(entropy_coefficient=coefficient)
        aims = arguments(PolicyRows(tensor(rows), tensor(rows), None, None, None), None, None, loss, False)
        denominator = torch.ones((), dtype=torch.float64)
        value, metrics, *gradients = policy._forward(*sides, *aims, denominator, 1.0, None, True, True, True)
        assert value.shape == () and [g.shape for g in gradients] == [side.shape for side in sides[:2]]
        assert ("keep_probabilities" in launches) == (dtype == torch.bfloat16)
        assert ("scale_each" in launches) == (dtype == torch.bfloat16 and not coefficient)


@pytest.mark.parametrize(
    ("rows", "function", "account"),
    [
        (16_384, "linear_logprob", 1.294e9),
        (16_384, "linear_policy_loss", 1.343e9),
        (4915, "linear_policy_loss", 1.176e9),
        (17_664, "linear_policy_loss", 1.435e9),
        (35_328, "linear_policy_loss", 2.2e9),
        (65_536, "linear_policy_loss", 2.9e9),
    ],
)
def test_the_head_s_memory(launches, rows, function, account):
    """Peak of the live bytes, both gradients included, within 2 %.

    On an H200, where the library keeps memory too, it was 1.36 GB for 16k rows by `linear_logprob`.
    """
    logprob, policy = (
        importlib.import_module(f"searchr1_kernels.linear_{name}") for name in ("logprob", "policy_loss")
    )
    size, vocabulary = 2048, 151_936
    sides = tensor(rows, size, dtype=torch.bfloat16), tensor(vocabulary, size, dtype=torch.bfloat16), places(rows)
    known = PolicyRows(tensor(rows), tensor(rows), None, None, None)
    aims = arguments(known, None, None, PolicyLoss(kind="reinforce"), False)
    slopes = tensor(rows)
    with LiveBytes() as live:
        if function == "linear_logprob":
            *_, saved = logprob._forward(*sides, 1.0, None, False, True)
            logprob._backward(slopes, None, *sides, None, saved, 1.0, None, True, True)
        else:
            policy._forward(*sides, *aims, torch.ones((), dtype=torch.float64), 1.0, None, True, True, True)
    assert live.peak == pytest.approx(account, rel=0.02)
    assert live.peak <= 1.5e9 or rows > 17_664


def test_what_the_head_reads_by_descriptors(launches, monkeypatch):
    """Rows of whole 16 bytes, one after the other, on Hopper and on the larger Blackwell."""
    takes = importlib.import_module("searchr1_kernels._linear_forward_triton").takes
    rows, memory = tensor(9, 64, dtype=torch.bfloat16), tensor(2000, dtype=torch.bfloat16)

    def view(stride: int, offset: int = 0, step: int = 1) -> torch.Tensor:
        return memory.as_strided((9, 64), (stride, step), offset)

    assert takes(rows, rows) and takes(view(72), view(64, offset=8)) and takes(rows.half(), rows.half())
    for wrong in (view(68), view(56), view(0), view(64, offset=4), view(192, step=2)):
        assert not takes(wrong, rows) and not takes(rows, wrong)
    assert not takes(rows.float(), rows.float())
    for capability, taken in (((8, 9), False), ((10, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert takes(rows, rows) == taken
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not takes(rows, rows)


# -------------------------------------------------------------------------------- one kernel for every number of rows


@pytest.mark.parametrize(("softcap", "counts"), [(None, (4915, 1, 16_384, 40_001)), (30.0, (40_001, 44_001))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_head_of_any_number_of_rows(launches, dtype, softcap, counts):
    """One chunk and several; with a softcap only counts whose slabs have the same width, a constant of its kernels."""
    logprob, policy = (
        importlib.import_module(f"searchr1_kernels.linear_{name}") for name in ("logprob", "policy_loss")
    )
    weight = tensor(151_936, 2048, dtype=dtype)

    def run(rows: int) -> None:
        sides = tensor(rows, 2048, dtype=dtype), weight, places(rows)
        logprob._forward(*sides, 1.0, softcap, True, False)
        *scores, saved = logprob._forward(*sides, 0.7, softcap, True, True)
        for by_entropy in (None, tensor(rows)):
            logprob._backward(tensor(rows), by_entropy, *sides, scores[1], saved, 0.7, softcap, True, True)
        rows_ = PolicyRows(tensor(rows), tensor(rows), None, None, None)
        aims = arguments(rows_, None, None, PolicyLoss(), False)
        denominator = torch.ones((), dtype=torch.float64)
        policy._forward(*sides, *aims, denominator, 1.0, softcap, True, True, True)

    recording.one_set_of_kernels(launches, run, counts)


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-3b"])
def test_steps_of_any_number_of_sequences(launches, name):
    """Inputs lie as the engine sends them: arrays of 8-byte numbers end to end, so that every other one starts at a
    multiple of 16 bytes. 14 heads of fp32 are no multiple of 16 bytes."""
    model, cache = build(name, torch.bfloat16)
    params = SamplingParams(0.8, top_p=0.9)

    def decode(rows: int) -> None:
        *inputs, uniforms = places(5 * rows).split(rows)
        outputs = tensor(2 * rows, dtype=torch.int32)
        _decode_step(model, cache, places(257), [*inputs, uniforms.view(torch.float64)], outputs, params)()
        sample(tensor(rows, 151_936), uniforms.view(torch.float64), SamplingParams())

    def join(rows: int) -> None:
        lengths = np.array([70, *[1] * rows])
        _, slots, starts = places(2 * rows + 3).split([1, rows + 1, rows + 1])
        model.forward_cached(places(lengths.sum()), places(rows + 2), slots, starts, cache, lengths)

    recording.one_set_of_kernels(launches, decode, (64, 2, 1))
    recording.one_set_of_kernels(launches, join, (64, 2, 1))


@pytest.mark.parametrize("ways", [{}, {"OVERLAP": True}])
def test_the_scan_and_what_scales_of_any_number(launches, monkeypatch, ways):
    scan, scaling = _gae_triton, importlib.import_module("searchr1_kernels._scaling_triton")
    monkeypatch.setattr(scan, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    monkeypatch.setattr(scan, "LAUNCH_DIRECTLY", False)
    for name, value in ways.items():
        monkeypatch.setattr(scan, name, value)

    def run(tokens: int) -> None:
        for sequences in (1 + tokens // 244, 1):  # one tile per sequence, and many
            vectors = tensor(tokens), tensor(tokens)
            for mask in (None, tensor(tokens, dtype=torch.bool)):
                for offsets in (torch.int32, torch.int64):
                    ends = tensor(sequences + 1, dtype=offsets)
                    scan.scan(*vectors, ends, 0.99, 0.94, mask, tensor(2, tokens))

    recording.one_set_of_kernels(launches, run, (1_000_000, 20_001))
    assert set(launches) == {"scan_sequences", "scan_tiles", "apply_carries"}
    for shape in ((151_936, 2048), (152_064, 18_000), (5,)):  # more than 31 bits can count, and few
        for dtype in (torch.bfloat16, torch.float32):
            scaling.scale(tensor(*shape, dtype=dtype), tensor())


@pytest.mark.parametrize("vocabulary", [151_936, 128_256, 50_257, 32_001, 500])
def test_sampling_of_any_number_of_rows(launches, vocabulary):
    def run(rows: int) -> None:
        for options in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20}, {"top_p": 0.9, "top_k": 20}):
            sample(tensor(rows, vocabulary), tensor(rows, dtype=torch.float64), SamplingParams(**options))

    recording.one_set_of_kernels(launches, run, (256, 3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "size"), [(12, 64), (12, 32)])
def test_an_encoder_of_any_number_of_texts(launches, heads, size, dtype):
    """As `encoder_bert` reads its packed texts: the keys of a row are those from that row on."""
    attention = importlib.import_module("searchr1_kernels.cached_attention")
    width, longest = heads * size, 512

    def run(rows: int) -> None:
        packed = tensor(rows + longest - 1, 3 * width, dtype=dtype)
        stride = packed.stride(0)
        keys, values = (
            packed.as_strided((rows, heads, longest, size), (stride, size, stride, 1), offset)
            for offset in (width, 2 * width)
        )
        query = packed[:rows, :width].view(rows, heads, size)
        tiles = tensor(rows // 4, 2, dtype=torch.int32)
        attention.cached_attention(query, keys, values, places(rows), places(rows), tiles=tiles)

    recording.one_set_of_kernels(launches, run, (4096, 64))


def test_nothing_to_do_launches_nothing(launches):
    """A launch of no programs is an error."""
    kernels = importlib.import_module("searchr1_kernels")
    rows, heads, cache, angles = tensor(0, 64), tensor(0, 2, 16), tensor(3, 2, 8, 16), tensor(0, 1, 16)
    kernels.rms_norm(rows, tensor(64), 1e-6, rows)
    kernels.silu_mul(rows, rows)
    kernels.rotary_write(heads, heads, heads, angles, angles, cache, cache, places(0), places(0))
    kernels.cached_attention(heads, cache, cache, places(0), places(0))
    for sequences in (0, 3):
        kernels.gae(tensor(0), tensor(0), places(sequences + 1))
    for options in ({}, {"temperature": 0.0}, {"top_p": 0.9}):
        kernels.sample_tokens(tensor(0, 500), tensor(0, dtype=torch.float64), **options)
    for dtype in (torch.bfloat16, torch.float32):
        sides = tensor(0, 64, dtype=dtype), tensor(500, 64, dtype=dtype), places(0)
        kernels.linear_logprob(*sides, return_entropy=True)
        known, denominator = PolicyRows(tensor(0), tensor(0), None, None, None), torch.ones((), dtype=torch.float64)
        importlib.import_module("searchr1_kernels.linear_policy_loss")._forward(
            *sides, *arguments(known, None, None, PolicyLoss(), False), denominator, 1.0, None, True, True, True
        )
    importlib.import_module("searchr1_kernels._scaling_triton").scale(rows, tensor())
    assert not launches
