"""Making the base model: a tokenizer for any text, batches that learn what the policy writes, exact resumption."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from searchr1_fast import pretraining
from searchr1_fast.config import WorldConfig
from searchr1_fast.distributed import Ranks
from searchr1_fast.models import Decoder, DecoderConfig, load_model, load_tokenizer
from searchr1_fast.models.rope import apply_rotary, rotary_embedding
from searchr1_fast.pretraining import (
    EOS_TOKEN,
    RECIPES,
    Batches,
    deepen,
    learning_rate_factor,
    pretrain,
    train_tokenizer,
)
from searchr1_fast.world import build_world
from searchr1_fast.world.names import name_words
from searchr1_fast.world.traces import BASE_MIX, TraceWriter, documents

TAGS = [f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")]
RECIPE = replace(
    RECIPES["stem"], num_steps=8, tokens_per_step=400, warmup_steps=2, num_layers=1, num_entities=120, num_chains=80
)
ARCHITECTURE = DecoderConfig(pretraining.ARCHITECTURE.vocab_size, 32, 48, 1, 2, 1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def world_writers():
    """Writers and chains of a plain and of a rich world."""
    worlds = [
        build_world(WorldConfig(split="pretrain", num_entities=120, style=style, num_questions=80, comparison=0.05))
        for style in ("plain", "rich")
    ]
    return [TraceWriter(world, BASE_MIX) for world in worlds], [world.chains() for world in worlds]


@pytest.fixture(scope="module")
def tokenizer(world_writers):
    return train_tokenizer(*world_writers, ARCHITECTURE.vocab_size, seed=0)


@pytest.fixture
def tiny(monkeypatch):
    """Replace the architecture by a tiny one, which trains in a moment."""
    monkeypatch.setattr(pretraining, "ARCHITECTURE", ARCHITECTURE)


# -------------------------------------------------------------------------------------------------------- tokenizer


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from([*TAGS, " ", "\n\n", "Doc 1(", "é", "日本", "🤖"])).map("".join))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_tags_are_ordinary_text_of_several_tokens(tokenizer):
    special = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    assert special == [EOS_TOKEN]
    vocabulary = tokenizer.backend.get_vocab()
    for tag in TAGS:
        assert tag not in vocabulary
        assert len(tokenizer.encode(tag)) >= 2
    # and a token may straddle a tag's end
    assert any(">\n" in tokenizer.token_bytes(i).decode(errors="replace") for i in range(tokenizer.vocab_size))


def test_names_are_short(tokenizer):
    """Every word of a name, with its blank, is one token: reading a name means copying a few tokens."""
    assert {len(tokenizer.encode(f" {word}")) for word in name_words()} == {1}


def test_the_tokenizer_is_a_function_of_its_seed(world_writers, tokenizer):
    again = train_tokenizer(*world_writers, ARCHITECTURE.vocab_size, seed=0)
    assert again.backend.to_str() == tokenizer.backend.to_str()
    assert tokenizer.vocab_size <= ARCHITECTURE.vocab_size


# ---------------------------------------------------------------------------------------------------------- batches


def expected_batch(step: int, part: int, rich_share: float, end: int, tokenizer, writers, chains):
    """-> ids, targets and the documents' starts in a part of a step, written out document by document."""
    ids: list[int] = []
    targets: list[int | None] = []
    starts = []
    chunk = 0
    while len(ids) < RECIPE.tokens_per_step // 2:
        shares, seed = [1 - rich_share, rich_share], f"{RECIPE.seed}/{step}/{part}/{chunk}"
        chunk += 1
        exercises = {"reading_share": RECIPE.reading_share[end], "recall_share": RECIPE.recall_share[end]}
        for document in documents(writers, chains, shares, seed, 16, **exercises):
            starts.append(len(ids))
            for kind, text in document:
                piece = tokenizer.encode(text)
                ids += piece
                targets += piece if kind == "policy" else [None] * len(piece)
            ids.append(tokenizer.eos_id)
            targets.append(tokenizer.eos_id)
            targets[starts[-1]] = None
    return ids, targets, starts


@pytest.mark.parametrize(
    ("step", "part", "rich_share", "end"),
    [(0, 0, 0.0, 0), (0, 1, 0.0, 0), (8, 1, RECIPE.rich_share, 1)],  # start and end of the curriculum
)
def test_targets_are_what_the_policy_writes_and_the_end(tokenizer, world_writers, step, part, rich_share, end):
    writers, chains = world_writers
    token_ids, cu_seqlens, rows, targets = Batches(RECIPE, tokenizer, writers, chains)(step, part)
    ids, wanted, starts = expected_batch(step, part, rich_share, end, tokenizer, writers, chains)
    assert token_ids.tolist() == ids
    assert cu_seqlens.tolist() == [*starts, len(ids)]
    places = [place for place, target in enumerate(wanted) if target is not None]
    assert rows.tolist() == [place - 1 for place in places]  # the row before a token predicts it
    assert targets.tolist() == [wanted[place] for place in places]
    assert not set((rows + 1).tolist()) & set(cu_seqlens.tolist())  # none at a document's first token
    assert (targets == tokenizer.eos_id).sum() == len(starts)


def test_a_batch_is_a_function_of_its_step(tokenizer, world_writers):
    batches = Batches(RECIPE, tokenizer, *world_writers)
    late, early = batches(5, 0), batches(1, 1)
    for first, second in ((early, batches(1, 1)), (late, Batches(RECIPE, tokenizer, *world_writers)(5, 0))):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert early[0].tolist() != late[0].tolist()
    assert early[0].tolist() != batches(1, 0)[0].tolist()


def test_the_curriculum_begins_plain_and_ends_rich(tokenizer, world_writers):
    recipe = replace(RECIPE, tokens_per_step=4000)
    texts = [tokenizer.decode(Batches(recipe, tokenizer, *world_writers)(step, 0)[0].tolist()) for step in (0, 8)]
    assert "also called" not in texts[0]
    assert "also called" in texts[1]


def test_learning_rate_warms_up_stays_and_descends_to_zero():
    recipe = replace(RECIPE, num_steps=100, warmup_steps=10)
    factors = [learning_rate_factor(step, recipe) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:70] == [1.0] * 61
    assert factors[70:] == sorted(factors[70:], reverse=True)
    assert 0 < factors[99] < 0.04


# ------------------------------------------------------------------------------------------------------------ runs


class Killed(Exception):
    pass


def test_a_run_that_was_killed_goes_on_bit_for_bit(tiny, tokenizer, tmp_path, monkeypatch, capsys):
    for name in ("whole", "halves"):  # an existing tokenizer is not trained again
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
    pretrain("stem", tmp_path / "whole", RECIPE, None, save_every=3)
    backward, calls = pretraining._backward, itertools.count(1)

    def backward_until_killed(*arguments):
        if next(calls) == 11:  # two parts a step
            raise Killed
        return backward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "_backward", backward_until_killed)
        with pytest.raises(Killed):
            pretrain("stem", tmp_path / "halves", RECIPE, None, save_every=3)
    assert not (tmp_path / "halves" / "model.safetensors").exists()  # nothing that looks finished
    capsys.readouterr()
    pretrain("stem", tmp_path / "halves", RECIPE, None, save_every=3)
    assert "going on from step 3 of 8" in capsys.readouterr().out

    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "halves")]
    assert states[0]["step"] == states[1]["step"] == RECIPE.num_steps
    assert_same(states[0], states[1])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves")]
    assert_same(*weights)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights[0].values())


def assert_same(first, second) -> None:
    """Compare nested values; tensors must be equal bit for bit."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def test_it_learns_and_the_next_goes_on_from_it(tiny, tokenizer, tmp_path, capsys):
    stem, base = tmp_path / "stem", tmp_path / "base"
    stem.mkdir()
    tokenizer.save(stem)
    pretrain("stem", stem, replace(RECIPE, num_steps=60), None)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 1.0

    assert load_model(stem).config.tie_word_embeddings

    settings = {"tokens_per_step": 400, "num_layers": 1, "num_entities": 120, "num_chains": 80}
    recipe = replace(RECIPES["base"], num_steps=1, learning_rate=0.0, matrix_learning_rate=0.0, **settings)
    pretrain("base", base, recipe, stem)
    assert_same(load_file(base / "model.safetensors"), load_file(stem / "model.safetensors"))
    assert (base / "tokenizer.json").read_bytes() == (stem / "tokenizer.json").read_bytes()


def test_a_deeper_model_computes_the_same_and_all_of_it_learns(tokenizer, world_writers):
    model = Decoder(replace(ARCHITECTURE, num_hidden_layers=4))
    deep = deepen(model, 6)
    batch = Batches(RECIPE, tokenizer, *world_writers)(0, 0)
    assert torch.equal(deep.hidden(*batch[:2]), model.hidden(*batch[:2]))
    new = [i for i, layer in enumerate(deep.layers) if not layer.mlp.down_proj.weight.any()]
    assert new == [2, 4]  # spread among the old layers, which keep their order
    old = [layer for i, layer in enumerate(deep.layers) if i not in new]
    assert_same([layer.state_dict() for layer in old], [layer.state_dict() for layer in model.layers])

    optimizers = pretraining.make_optimizers(deep, RECIPE)
    for _ in range(2):  # in the first step, what comes before a matrix of zeros has no gradient
        pretraining._gradients(deep, Decoder(deep.config).bfloat16(), [batch], pretraining.ALONE)
        for optimizer in optimizers:
            optimizer.step()
    assert all(parameter.grad.any() for i in new for parameter in deep.layers[i].parameters())


def test_a_model_is_not_made_shallower(tiny, tokenizer, tmp_path):
    pretrain("stem", tmp_path / "stem", replace(RECIPE, num_steps=1, num_layers=2), None)
    with pytest.raises(ValueError, match="has 2 layers, more than the 1 of this recipe"):
        pretrain("base", tmp_path / "base", replace(RECIPE, num_steps=1), tmp_path / "stem")
    assert not (tmp_path / "base").exists()


def test_two_ranks_train_as_one_does(tiny, tokenizer, world_writers):
    """Ranks sum the gradients of their parts; their total, divided by all targets, gives those of a single rank."""
    batches = Batches(RECIPE, tokenizer, *world_writers)
    parts = [batches(3, part) for part in range(2)]
    assert len(parts[0][3]) != len(parts[1][3])  # so a mean of means would differ
    model, working = Decoder(ARCHITECTURE), Decoder(ARCHITECTURE).bfloat16()
    loss, num_tokens = pretraining._gradients(model, working, parts, pretraining.ALONE)
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    assert num_tokens == sum(len(part[0]) for part in parts)

    class Peer:
        """Adds what the other rank would send."""

        def all_reduce(self, tensor):
            self.sent = tensor.clone()
            return tensor if other is None else tensor.add_(other)

    other, peer = None, Peer()
    model.zero_grad()
    pretraining._gradients(model, working, parts[1:], peer)
    other = peer.sent
    model.zero_grad()
    again, _ = pretraining._gradients(model, working, parts[:1], peer)
    assert again == pytest.approx(loss, rel=1e-5)
    for parameter, gradient in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_ranks_that_cannot_share_the_parts_are_told_so(tmp_path):
    with pytest.raises(ValueError, match="3 ranks cannot share 2 parts"):
        pretrain("stem", tmp_path / "none", RECIPE, None, ranks=Ranks(0, 3, torch.device("cpu")))
    assert not (tmp_path / "none").exists()


def test_a_folder_holds_one_recipe_and_its_tokenizer(tiny, tmp_path):
    pretrain("stem", tmp_path, replace(RECIPE, num_steps=1), None)
    tokenizer, model = load_tokenizer(tmp_path), load_model(tmp_path)
    assert tokenizer.vocab_size <= model.config.vocab_size == ARCHITECTURE.vocab_size
    assert tokenizer.eos_token == EOS_TOKEN
    with pytest.raises(ValueError, match="another recipe; remove"):
        pretrain("stem", tmp_path, replace(RECIPE, num_steps=1, learning_rate=1e-3), None)


def test_first_layer_heads_begin_by_looking_back_as_far_as_their_number():
    model = Decoder(pretraining.ARCHITECTURE)
    pretraining.look_back(model)
    attention, config = model.layers[0].self_attn, model.config
    cos, sin = rotary_embedding(torch.arange(40), config.head_dim, config.rope_theta)
    nothing = torch.zeros(40, config.hidden_size)  # no content: only the biases remain
    query = apply_rotary(attention.q_proj(nothing).unflatten(-1, (config.num_attention_heads, -1)), cos, sin)
    key = apply_rotary(attention.k_proj(nothing).unflatten(-1, (config.num_key_value_heads, -1)), cos, sin)
    weights = torch.einsum("hd,thd->ht", query[-1], key).div(config.head_dim**0.5).softmax(-1)  # [H, 40]
    for head in range(1, config.num_attention_heads):
        assert weights[head].argmax() == 39 - head
        assert weights[head].max() > 0.9
