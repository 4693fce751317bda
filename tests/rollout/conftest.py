"""Fixtures: a tiny random model that favours tags, a byte-level BPE that splits them variously, a rollout by hand."""

from __future__ import annotations

import re
import zlib
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from vllm_stand_in import StandIn

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import Decoder, DecoderConfig, TextTokenizer
from searchr1_fast.models.kv_cache import BLOCK_SIZE
from searchr1_fast.protocol import INVALID_ACTION_MESSAGE, format_observation, parse_action
from searchr1_fast.rollout import RolloutRequest, VllmEngine
from searchr1_fast.rollout.sampling import stream_keys, uniforms
from searchr1_fast.types import Action, FinishReason, Passage, Question

EOS = "<|end|>"
# Pieces on both sides of the tags' borders. Each is merged from the left, so its prefixes are tokens too.
PIECES = [
    "></",
    ">\n\n",
    "<search>",
    "</search>",
    "<answer>",
    "</answer>",
    "search>",
    "answer>a",
    "ch>b",
    "é ",
    "information",
]
PIECES += re.findall(r" ?\w+", INVALID_ACTION_MESSAGE)  # or it would be longer than all the rest
# (token, token that the model favours after it): whole tags, and tags in pieces that straddle their ends
HABITS = [
    ("?", "<search>"),
    ("?", "<answer>"),
    (" ", "<search>"),
    ("<search>", "a"),
    ("<search>", "é"),
    ("é", "</search"),
]
HABITS += [
    ("a", "</search>"),
    ("b", "a"),
    ("</search", "></"),
    ("<answer>", "b"),
    ("b", "</answer"),
    ("</answer", ">\n\n"),
]
HABITS += [("\n", "<search>"), ("\n", "<answer>"), ("></", "<answer>"), (".", "<answer>"), ("</", EOS), ("\n", "b")]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1), numba.set_num_threads(1)
    yield
    torch.set_num_threads(before[0]), numba.set_num_threads(before[1])


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """-> a tokenizer with all bytes, and merges across every border of a tag (no pre-tokenizer splits them)."""
    to_visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    visible = lambda text: to_visible.pre_tokenize_str(text)[0][0]  # noqa: E731
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for piece in map(visible, PIECES):
        for end in range(2, len(piece) + 1):
            if piece[:end] not in vocab:
                vocab[piece[:end]] = len(vocab)
                merges.append((piece[: end - 1], piece[end - 1]))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return TextTokenizer(backend, eos_token=EOS)


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """seed -> random decoder with the HABITS and `padding` ids beyond the tokenizer's; `head_dim` 0: the default 8."""

    def make(seed: int, padding: int = 3, head_dim: int = 0) -> Decoder:
        torch.manual_seed(seed)
        model = Decoder(
            DecoderConfig(
                vocab_size=tokenizer.vocab_size + padding,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=head_dim,
                initializer_range=0.25,
            )
        )
        with torch.no_grad():
            embedding = model.model.embed_tokens.weight.clone()
            for before, after in HABITS:
                first, second = (tokenizer.encode(text, special_tokens=True)[0] for text in (before, after))
                model.head_weight[second] += 4.0 * embedding[first]
            model.head_weight[tokenizer.vocab_size :] *= 1.5
        return model

    return make


def _search(queries):
    results = []
    for query in queries:
        seed = zlib.crc32(query.encode())
        words = [f"w{(seed >> shift) % 97}" for shift in range(12)]
        results.append([Passage(f"{seed}-{rank}", f"T{rank}", " ".join(words)) for rank in range(seed % 4)])
    return results


@pytest.fixture(scope="session")
def fake_search():
    """-> a search function: zero to three passages that depend on the query alone."""
    return _search


@pytest.fixture
def small_blocks(monkeypatch):
    """Use blocks of 4 tokens: prompts and observations here are too short to ever share a block of 32."""
    monkeypatch.setitem(BLOCK_SIZE, "cpu", 4)


@pytest.fixture
def config() -> RolloutConfig:
    """-> small budgets, each of which is reached now and then."""
    return RolloutConfig(
        max_searches=3, max_turn_tokens=24, max_observation_tokens=60, max_sequence_tokens=260, max_num_seqs=5
    )


@pytest.fixture
def make_vllm_engine(tokenizer, config):
    """model, sampling -> an engine over a stand-in for vLLM."""

    def make(model, sampling=None, **stand_in) -> VllmEngine:
        generator = StandIn(model, tokenizer.eos_ids, **stand_in)
        return VllmEngine(model, tokenizer, config, sampling, generator=generator)

    return make


@pytest.fixture(scope="session")
def make_requests():
    """n, group size -> requests; the members of a group share the prompt."""

    def make(count: int, group_size: int = 1, seed: int = 0) -> list[RolloutRequest]:
        requests = []
        for i in range(count):
            group = i // group_size
            question = Question(f"q{group}", "who?", ("x",), "test")
            prompt = f"Question {group}: " + "who? " * (1 + group % 4)
            requests.append(RolloutRequest(question, group, prompt, seed=1000 * seed + i))
        return requests

    return make


@pytest.fixture(scope="session")
def rollout_by_hand(tokenizer):
    """-> one rollout by definition: no cache, no batch, tags found with `in`, probabilities in fp64.

    `sampled` are the ids to be checked; they decide where a choice depends on the model's last digits.
    """

    def rollout(model, request, config, sampled, search=_search, temperature=1.0) -> SimpleNamespace:
        ids = tokenizer.encode(request.prompt)
        mask, logprobs, actions, drawn = [False] * len(ids), [0.0] * len(ids), [], 0

        def observe(text: str) -> None:
            new = tokenizer.encode(text)
            ids.extend(new), mask.extend([False] * len(new)), logprobs.extend([0.0] * len(new))

        def result(reason: FinishReason) -> SimpleNamespace:
            return SimpleNamespace(ids=ids, mask=mask, logprobs=logprobs, actions=actions, reason=reason)

        for turn in range(config.max_searches + 1):
            is_final = turn == config.max_searches
            if is_final:
                observe(config.final_turn_message)
            written, start = b"", len(ids)
            while len(ids) < min(start + config.max_turn_tokens, config.max_sequence_tokens):
                logits = model.logits(torch.tensor(ids), torch.tensor([0, len(ids)]))[-1].detach().double()
                table = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
                u = uniforms(stream_keys([request.seed]), np.array([drawn], dtype=np.uint64))[0]
                token = _choose(table.exp().numpy(), u, temperature == 0.0, sampled[len(ids) : len(ids) + 1])
                drawn += 1
                ids.append(token), mask.append(True), logprobs.append(float(table[token]))
                if token == tokenizer.eos_id:
                    break
                written += tokenizer.token_bytes(token)
                if b"</search>" in written or b"</answer>" in written:
                    break
            action, content = parse_action(written.decode(errors="replace"))
            actions.append((action, content))
            room = config.max_sequence_tokens - len(ids) - 1
            if turn + 1 == config.max_searches:
                room -= len(tokenizer.encode(config.final_turn_message))
            if action is Action.ANSWER:
                return result(FinishReason.ANSWER)
            if is_final:
                is_full = len(ids) == config.max_sequence_tokens
                return result(FinishReason.LENGTH if is_full else FinishReason.NO_ANSWER)
            if action is Action.INVALID:
                if len(tokenizer.encode(INVALID_ACTION_MESSAGE)) > room:
                    return result(FinishReason.LENGTH)
                observe(INVALID_ACTION_MESSAGE)
                continue
            room = min(room, config.max_observation_tokens)
            texts = _observations_longest_first(search([content])[0])
            text = next((text for text in texts if len(tokenizer.encode(text)) <= room), None)
            if text is None:
                return result(FinishReason.LENGTH)
            observe(text)
        raise AssertionError("the final turn returns")

    return rollout


def _choose(probabilities: np.ndarray, u: float, is_greedy: bool, sampled: np.ndarray) -> int:
    """-> the token at u, or the likeliest; `sampled` [0 or 1] if it is as good up to rounding."""
    ends = np.cumsum(probabilities)
    for token in sampled.tolist():
        if is_greedy and probabilities[token] > probabilities.max() * (1 - 1e-5):
            return token
        if not is_greedy and ends[token] - probabilities[token] - 1e-5 < u < ends[token] + 1e-5:
            return token
    return int(probabilities.argmax() if is_greedy else np.searchsorted(ends, u, side="right"))


def _observations_longest_first(passages: list[Passage]) -> list[str]:
    """-> every observation that may be shown: fewer passages, then fewer words of the first, then none."""
    texts = [format_observation(passages[:count]) for count in range(len(passages), 0, -1)]
    if passages:
        first, words = passages[0], passages[0].text.split(" ")
        for count in range(len(words) - 1, -1, -1):
            texts.append(format_observation([Passage(first.id, first.title, " ".join(words[:count]))]))
    return [*texts, format_observation([])]
