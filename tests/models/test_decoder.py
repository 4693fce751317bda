"""The decoder against transformers, by family: logits and gradients; packed against cached and one at a time."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from searchr1_fast.models import Decoder, DecoderConfig, KVCache, load_model, rope
from searchr1_fast.models import cached_attention as module
from searchr1_fast.models.cached_attention import cached_attention, cached_attention_reference, find_chunks
from searchr1_fast.models.decoder_config import Llama3Scaling
from searchr1_fast.models.rope import rotary_embedding, rotary_rows


def assert_within(actual: torch.Tensor, expected: torch.Tensor, relative: float, what: str) -> None:
    """Require the largest difference to be within `relative` of the largest value."""
    scale, error = expected.abs().max(), (actual - expected).abs().max()
    assert error <= relative * scale, f"{what}: off by {error} of {scale}"


def test_logits_and_gradients_equal_transformers(shape, make_reference, make_pack, tmp_path):
    """Sequences of a pack, each alone in transformers; one of them exceeds the scaled ropes' original context."""
    reference = make_reference(shape)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    token_ids, cu_seqlens = make_pack([5, 1, 40], reference.config.vocab_size)
    logits = model.logits(token_ids, cu_seqlens)
    expected = torch.cat([reference(part[None]).logits[0] for part in token_ids.split(cu_seqlens.diff().tolist())])
    assert_within(logits, expected, 1e-5, "logits")

    weights = torch.randn_like(expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(reference.named_parameters())
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        # A bias of the keys shifts all scores of a query equally, so its gradient is zero, and what remains is
        # rounding.
        scale = gradients[name.replace("k_proj.bias", "k_proj.weight")].grad.abs().max()
        error = (parameter.grad - gradients[name].grad).abs().max()
        assert error <= 1e-5 * scale, f"{name}: gradient off by {error} of {scale}"


def test_packed_equals_one_at_a_time(shape, make_reference, make_pack, tmp_path):
    """Hidden states and gradients agree up to rounding: matrix products of other sizes sum in another order."""
    make_reference(shape).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    token_ids, cu_seqlens = make_pack([3, 31, 1, 12], model.config.vocab_size)
    packed = model.hidden(token_ids, cu_seqlens)
    alone = [model.hidden(ids, torch.tensor([0, len(ids)])) for ids in token_ids.split(cu_seqlens.diff().tolist())]
    alone = torch.cat(alone)
    assert_within(packed, alone, 2e-6, "hidden states")
    weights, parameters = torch.randn_like(packed), dict(model.model.named_parameters())
    gradients = [torch.autograd.grad((x * weights).sum(), list(parameters.values())) for x in (packed, alone)]
    for name, got, expected in zip(parameters, *gradients, strict=True):
        if not name.endswith("k_proj.bias"):
            assert_within(got, expected, 1e-5, name)


def test_the_same_ids_without_llamas_scaling_are_another_model(make_reference, make_pack, tmp_path):
    """Shows that the tests above would notice a scaling that is not applied."""
    reference = make_reference("llama-scaled-tied")
    reference.save_pretrained(tmp_path)
    token_ids, cu_seqlens = make_pack([40], 211)
    scaled = load_model(tmp_path)
    plain = Decoder(DecoderConfig(211, 48, 80, 3, 4, 2, model_type="llama", tie_word_embeddings=True))
    plain.load_state_dict(scaled.state_dict())
    difference = (plain.logits(token_ids, cu_seqlens) - scaled.logits(token_ids, cu_seqlens)).abs()
    assert difference[20:].max() > 0.1


def test_llama3_frequencies_at_the_published_scaling():
    """By hand, for Llama 3.2's head of 64: in 8192 places pair i makes 8192 * theta**(-i/32) / 2 pi turns."""
    scaling = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    angles = {}
    for given in (None, scaling):
        cos, sin = rotary_embedding(torch.tensor([1]), 64, 500000.0, given)
        angles[given] = torch.atan2(sin, cos)[0, 0, :32].double()
    ratio = angles[scaling] / angles[None]
    turns = 8192 * 500000.0 ** (-torch.arange(32).double() / 32) / (2 * torch.pi)
    for i in range(32):
        mixed = (turns[i] - 1) / 3
        expected = 1.0 if turns[i] >= 4 else 1 / 32 if turns[i] <= 1 else float(mixed + (1 - mixed) / 32)
        assert ratio[i] == pytest.approx(expected, rel=2e-5), f"pair {i}, {turns[i]:.2f} turns"
    assert {round(float(r), 4) for r in ratio} >= {1.0, 0.0312}


def test_cached_forward_equals_packed_forward(shape, make_reference, make_pack, tmp_path):
    """Ragged appends of one or several tokens, to slots out of order, equal one packed pass."""
    make_reference(shape, seed=1).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    cache = KVCache(model.config, num_slots=4, max_length=64)
    token_ids, cu_seqlens = make_pack([20, 9, 33], model.config.vocab_size)
    sequences = token_ids.split(cu_seqlens.diff().tolist())
    packed = model.hidden(token_ids, cu_seqlens).detach().split(cu_seqlens.diff().tolist())
    slots = torch.tensor([3, 0, 2])
    done = [0, 0, 0]
    for counts in ([4, 2, 7], [1, 1, 1], [6, 3, 20], [1, 3, 1]):
        new = torch.cat([s[d : d + n] for s, d, n in zip(sequences, done, counts, strict=True)])
        cu_new = torch.tensor([0, *counts]).cumsum(0)
        last = model.forward_cached(new, cu_new, slots, torch.tensor(done), cache)
        done = [d + n for d, n in zip(done, counts, strict=True)]
        expected = torch.stack([hidden[d - 1] for hidden, d in zip(packed, done, strict=True)])
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


def make_blocks(num_slots, num_kv_heads, length, size=16, dtype=torch.float32):
    """-> keys, values [P, G, size, 16] in blocks in any order, some without an owner, and the table.

    What lies past `length`, and in blocks without an owner, is NaN.
    """
    width = -(-length // size)
    order = torch.randperm(num_slots * width + 2)
    table = order[2:].view(num_slots, width).int()
    memory = []
    for _ in range(2):
        rows = torch.randn(num_slots, num_kv_heads, width * size, 16)
        rows[:, :, length:] = torch.nan
        blocks = torch.full((len(order), num_kv_heads, size, 16), torch.nan)
        blocks[order[2:]] = rows.unflatten(2, (width, size)).transpose(1, 2).flatten(0, 1)
        memory.append(blocks.to(dtype))
    return *memory, table


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_cached_attention_equals_its_plain_twin(dtype, tolerance):
    torch.manual_seed(2)
    for num_heads, num_kv_heads, length in ((4, 2, 37), (6, 6, 1), (8, 1, 130)):
        memory = make_blocks(5, num_kv_heads, length, dtype=dtype)
        query = (torch.randn(11, num_heads, 16) * 3).to(dtype)
        slots, positions = torch.randint(5, (11,)), torch.randint(length, (11,))
        got = cached_attention(query, *memory, slots, positions)
        assert got.dtype == dtype
        exact = (x.double() if x.is_floating_point() else x for x in (query, *memory))
        expected = cached_attention_reference(*exact, slots, positions)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_cached_attention_of_flat_and_of_peaky_scores(scale):
    """From equal scores to scores further apart than fp32 weights can show, with the largest of all in any block."""
    torch.manual_seed(3)
    memory = make_blocks(3, 2, 200)
    query, slots, positions = torch.randn(30, 4, 16) * scale, torch.arange(30) % 3, torch.randint(200, (30,))
    got = cached_attention(query, *memory, slots, positions)
    exact = (x.double() if x.is_floating_point() else x for x in (query, *memory))
    expected = cached_attention_reference(*exact, slots, positions)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_token_attends_with_the_same_bits_alone_and_beside_those_that_share_its_blocks():
    torch.manual_seed(4)
    keys, values, table = make_blocks(20, 2, 100)
    table[1:, :3] = table[0, :3]
    query, slots, positions = torch.randn(20, 4, 16), torch.randperm(20), torch.randint(48, 100, (20,))
    together = cached_attention(query, keys, values, table, slots, positions)
    for t in range(20):
        own = slice(t, t + 1)
        alone = cached_attention(query[own], keys, values, table, slots[own], positions[own])
        assert torch.equal(together[own], alone)


def test_tokens_that_share_blocks_are_put_side_by_side():
    table = torch.tensor([[7, 1, 2], [5, 3, 9], [7, 1, 8], [5, 4, 0], [7, 6, 2]], dtype=torch.int32)
    slots, tokens = torch.tensor([4, 3, 2, 1, 0, 4]), torch.tensor([0, 1, 2, 3, 4])
    order = module.order_by_blocks(table, slots, tokens)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    rows = table[slots[order]]
    for width in (1, 2):  # equal beginnings are adjacent
        beginnings = [tuple(row[:width].tolist()) for row in rows]
        assert len(set(beginnings)) == 1 + sum(a != b for a, b in zip(beginnings, beginnings[1:], strict=False))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_tokens_that_join_together_attend_as_they_would_alone(num_heads, num_kv_heads, dtype, tolerance):
    """A step like the engine's: decoding sequences among prompts, which begin at place 0, and observations."""
    torch.manual_seed(5)
    runs = [(2, 40, 1), (0, 0, 100), (4, 17, 1), (1, 50, 90), (3, 130, 3), (5, 8, 30), (6, 132, 8)]
    slots = torch.cat([torch.full((count,), slot) for slot, _, count in runs])  # runs: slot, first place, count
    positions = torch.cat([torch.arange(first, first + count) for _, first, count in runs])
    memory = make_blocks(7, num_kv_heads, 140, dtype=dtype)
    query = (torch.randn(len(slots), num_heads, 16) * 3).to(dtype)
    chunks = find_chunks(slots, positions, memory[2])
    found = [(chunk.slot, chunk.end - chunk.begin, chunk.length) for chunk in chunks.together]
    assert found == [(0, 100, 100), (1, 90, 140)]
    exact = (x.double() if x.is_floating_point() else x for x in (query, *memory))
    expected = cached_attention_reference(*exact, slots, positions)
    for given in (chunks, None):
        got = cached_attention(query, *memory, slots, positions, given)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_neighbours_of_another_slot_or_place_are_no_chunk():
    slots = torch.tensor([0] * 5 + [1] * 5 + [1] * 4 + [2] * 3)
    positions = torch.tensor([*range(5), *range(5, 10), *range(11, 15), *range(3)])
    chunks = find_chunks(slots, positions, torch.arange(3, dtype=torch.int32)[:, None], module.Least(4, 1))
    assert [chunk[:4] for chunk in chunks.together] == [(0, 5, 0, 5), (5, 10, 1, 10), (10, 14, 1, 15)]
    assert chunks.alone.tolist() == [14, 15, 16]


def test_wanted_rows_equal_those_rows_of_all(make_pack):
    torch.manual_seed(6)
    model = Decoder(DecoderConfig(50, 32, 48, 2, 4, 2))
    token_ids, cu_seqlens = make_pack([9, 4, 12], 50)
    rows = torch.tensor([0, 8, 9, 20, 24])
    gradients = []
    for hidden in (model.hidden(token_ids, cu_seqlens)[rows], model.hidden(token_ids, cu_seqlens, rows)):
        gradients.append((hidden, torch.autograd.grad(hidden.square().sum(), list(model.model.parameters()))))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    for name, whole, part in zip(dict(model.model.named_parameters()), gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(whole, part, rtol=1e-4, atol=1e-6, msg=name)


def test_sequences_of_a_pack_do_not_see_each_other():
    torch.manual_seed(3)
    model = Decoder(DecoderConfig(50, 32, 48, 2, 4, 2))
    first, second, other = torch.randint(50, (3, 9))
    cu_seqlens = torch.tensor([0, 9, 18])
    together = model.hidden(torch.cat([first, second]), cu_seqlens)
    changed = model.hidden(torch.cat([other, second]), cu_seqlens)
    assert torch.equal(together[9:], changed[9:])
    assert not torch.allclose(together[:9], changed[:9])


def test_bf16_forward_is_close_to_fp32(make_pack):
    torch.manual_seed(4)
    model = Decoder(DecoderConfig(50, 64, 96, 2, 4, 2))
    token_ids, cu_seqlens = make_pack([12, 30], 50)
    exact = model.hidden(token_ids, cu_seqlens)
    model.bfloat16()
    rounded = model.hidden(token_ids, cu_seqlens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.1


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_parameters_are_begun_anew_whatever_the_memory_held(model_type):
    with torch.device("meta"):
        model = Decoder(DecoderConfig(23, 16, 24, 2, 2, 1, model_type=model_type))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if "norm" in name:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("scaling", [None, Llama3Scaling(8.0, 1.0, 4.0, 8192)])
def test_angles_from_a_table_are_those_computed_for_each_position(monkeypatch, scaling):
    """In any order, past the table's end, and in and out of inference mode; only a table too short is made again."""
    monkeypatch.setattr(rope, "_tables", {})
    made, real = [], rope.rotary_embedding
    monkeypatch.setattr(
        rope, "rotary_embedding", lambda positions, *kind: made.append(positions) or real(positions, *kind)
    )
    generator = torch.Generator().manual_seed(0)
    for longest, inference in ((900, True), (1024, False), (40_000, False), (3, True), (0, False)):
        positions = torch.randint(longest + 1, (70 if longest else 0,), generator=generator)
        with torch.inference_mode(inference):
            for have, want in zip(
                rotary_rows(positions, 22, 1e6, scaling), rotary_embedding(positions, 22, 1e6, scaling), strict=True
            ):
                assert have.shape == want.shape == (len(positions), 1, 22)
                torch.testing.assert_close(
                    have, want, rtol=0, atol=1.2e-7
                )  # a library may round the ends of a row differently
    assert [len(positions) for positions in made] == [1024, 65_536, 0]


def test_angles_that_were_traced_are_not_kept_for_others():
    """torch traces with tensors that only stand for numbers; neither kind may be given to a caller with the other."""
    with FakeTensorMode():
        traced, _ = rotary_embedding(torch.arange(5), 22, 1234.5)
    real, _ = rotary_embedding(torch.arange(5), 22, 1234.5)
    assert (type(traced), type(real)) == (FakeTensor, torch.Tensor)
    with FakeTensorMode():
        assert type(rotary_embedding(torch.arange(5), 22, 1234.5)[0]) is FakeTensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("known", [True, False])
def test_cached_forward_on_a_gpu_equals_packed_forward(known):
    """Prompts, then lone tokens and tokens that join beside them."""
    torch.manual_seed(0)
    config = DecoderConfig(50, 64, 96, 2, 4, 2)
    model = Decoder(config).cuda()
    cache = KVCache(config, num_slots=3, max_length=600, device="cuda")
    tokens = [torch.randint(config.vocab_size, (n,), device="cuda") for n in (551, 3, 90)]
    done = [0, 0, 0]
    for counts in ([540, 2, 1], [1, 1, 70], [10, 0, 19]):
        slots = [s for s, n in enumerate(counts) if n]
        pieces = [tokens[s][done[s] : done[s] + counts[s]] for s in slots]
        lengths = np.array([len(piece) for piece in pieces])
        last = model.forward_cached(
            torch.cat(pieces),
            torch.tensor([0, *lengths.cumsum()], device="cuda"),
            torch.tensor(slots, device="cuda"),
            torch.tensor([done[s] for s in slots], device="cuda"),
            cache,
            lengths if known else None,
        )
        for row, s in enumerate(slots):
            done[s] += counts[s]
            whole = model.hidden(tokens[s][: done[s]], torch.tensor([0, done[s]], device="cuda"))
            torch.testing.assert_close(last[row], whole[-1], rtol=1e-4, atol=1e-4)
