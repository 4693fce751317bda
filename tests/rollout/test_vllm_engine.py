"""vLLM behind the engine's interface: turn logic over a stand-in, everywhere; and the real one where it is installed.

The stand-in keeps what vLLM promises and no more: a request of token ids gets one token per step under its own seed,
with the sampler's log-probability; weights are a copy, on which loading has to be told every name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from searchr1_fast.config import Config, RolloutConfig, load_config
from searchr1_fast.console import Console
from searchr1_fast.evaluate import build_engine
from searchr1_fast.models import Decoder, load_model, load_tokenizer
from searchr1_fast.prompt import PromptBuilder
from searchr1_fast.protocol import format_observation
from searchr1_fast.rollout import Engine, RolloutRequest, SamplingParams, SearchLoop, VllmEngine, vllm_engine
from searchr1_fast.rollout.sampling import head_logits, sample, stream_keys, uniforms
from searchr1_fast.rollout.sequence import Sequence
from searchr1_fast.rollout.vllm_engine import turn_seed
from searchr1_fast.rollout.vllm_model import CPU_BLOCK, Piece, is_reported, logprobs_mode
from searchr1_fast.rollout.weight_handover import TOLERANCE, check_handover, known_sequences, named_weights, score
from searchr1_fast.train import train
from searchr1_fast.types import Action, FinishReason, Passage, Question

GREEDY = SamplingParams(0.0)


class StandIn:
    """vLLM as far as the engine may rely on it. `lost`: names that are handed over and ignored."""

    version = "0, a stand-in,"

    def __init__(self, model: Decoder, eos_ids, lost=()) -> None:
        self.model = Decoder(model.config)
        if model.config.tie_word_embeddings:
            self.model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.head_weight))
        self.eos_ids, self.lost = set(eos_ids), set(lost)
        self.requests: dict[str, dict] = {}
        self.seeds: list[int] = []
        self.aborted: list[str] = []
        self.sleep()

    def add(self, request_id, token_ids, limit, seed, sampling):
        self.seeds.append(seed)
        self.requests[request_id] = dict(ids=list(token_ids), limit=limit, seed=seed, sampling=sampling, count=0)

    @torch.no_grad()
    def step(self):
        pieces = []
        for name, request in list(self.requests.items()):
            ids = torch.tensor(request["ids"])
            hidden = self.model.hidden(ids, torch.tensor([0, len(ids)]))[-1:]
            number = uniforms(stream_keys([request["seed"]]), np.array([request["count"]], dtype=np.uint64))
            logits = head_logits(hidden, self.model.head_weight)
            token, logprob = sample(logits, torch.from_numpy(number), request["sampling"])
            request["ids"].append(token.item())
            request["count"] += 1
            is_finished = token.item() in self.eos_ids or request["count"] == request["limit"]
            pieces.append(Piece(name, [token.item()], [logprob.item()], 0, is_finished))
            if is_finished:
                del self.requests[name]
        return pieces

    def abort(self, request_ids):
        self.aborted += request_ids
        for name in request_ids:
            del self.requests[name]

    @torch.no_grad()
    def load(self, weights):
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            if name not in self.lost:
                own.pop(name).copy_(tensor)
        assert own.keys() == self.lost

    @torch.no_grad()
    def sleep(self):
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            parameter.uniform_(-1e-3, 1e-3, generator=generator)  # what vLLM's dummy weights are

    def close(self):
        self.requests = None

    def score(self, sequences):
        return [score(self.model, [token_ids]) for token_ids in sequences]


@pytest.fixture
def make_engine(tokenizer, config):
    """model, sampling -> an engine over a stand-in."""

    def make(model, sampling=None, lost=()):
        stand_in = StandIn(model, tokenizer.eos_ids, lost)
        return VllmEngine(model, tokenizer, config, sampling, generator=stand_in)

    return make


def check_same(trajectories, others):
    assert len(trajectories) == len(others) > 0
    for one, other in zip(trajectories, others, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
        np.testing.assert_allclose(one.rollout_logprobs, other.rollout_logprobs, atol=1e-4)
        assert (one.turns, one.segments, one.finish_reason) == (other.turns, other.segments, other.finish_reason)


def check_logprobs(model, trajectories, temperature):
    """Every policy token's are the whole vocabulary's at the temperature, as the trainer computes them."""
    for trajectory in trajectories:
        ids = torch.from_numpy(trajectory.token_ids)
        with torch.no_grad():
            table = (model.logits(ids, torch.tensor([0, len(ids)])) / temperature).log_softmax(-1)
        expected = table[:-1].gather(1, ids[1:, None])[:, 0].numpy()
        mask = trajectory.loss_mask[1:]
        np.testing.assert_allclose(trajectory.rollout_logprobs[1:][mask], expected[mask], atol=1e-4)


# ------------------------------------------------------------------------------------------------------- turn logic


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_rollouts_are_the_native_engines(
    make_model, make_engine, tokenizer, config, make_requests, fake_search, overlap
):
    """Tags that end inside tokens, turns that run full, sequences that run full, forced final turns."""
    actions = Counter()
    config = config.model_copy(update={"overlap": overlap, "final_turn_message": "\n<answer>"})
    for seed in (3, 4, 5):
        model, requests = make_model(seed), make_requests(9, seed=seed)
        engine = make_engine(model, GREEDY)
        trajectories = SearchLoop(engine, fake_search, config=config).run(requests)
        native = SearchLoop(Engine(model, tokenizer, config, GREEDY), fake_search)
        check_same(trajectories, native.run(requests))
        assert not engine.has_work
        assert not engine._generator.requests
        assert engine.statistics.num_decode_tokens == native.statistics.num_decode_tokens
        actions.update(turn.action for trajectory in trajectories for turn in trajectory.turns)
    assert actions[Action.SEARCH] > 0 < actions[Action.INVALID]


def test_sampled_turns_end_at_the_first_tag_whatever_the_batch(
    make_model, make_engine, tokenizer, config, make_requests, fake_search
):
    model, requests = make_model(4), make_requests(12, group_size=3, seed=4)
    engine = make_engine(model, SamplingParams(1.3))
    trajectories = SearchLoop(engine, fake_search).run(requests)
    check_logprobs(model, trajectories, 1.3)
    endings = Counter()
    for trajectory in trajectories:
        for turn in trajectory.turns:
            ids = trajectory.token_ids[turn.start : turn.end].tolist()
            before, whole = (b"".join(map(tokenizer.token_bytes, part)) for part in (ids[:-1], ids))
            tags = (b"</search>", b"</answer>")
            assert not any(tag in before for tag in tags)
            assert not set(ids[:-1]) & set(tokenizer.eos_ids)
            is_full = len(ids) == config.max_turn_tokens or turn.end == config.max_sequence_tokens
            is_tag, is_eos = any(tag in whole for tag in tags), ids[-1] in tokenizer.eos_ids
            assert is_full or is_tag or is_eos
            endings.update({"tag": is_tag, "inside": is_tag and not whole.endswith(tags), "full": is_full})
    assert all(endings[name] for name in ("tag", "inside", "full"))
    assert {t.finish_reason for t in trajectories} >= {FinishReason.ANSWER, FinishReason.LENGTH}
    one_by_one = make_engine(model, SamplingParams(1.3))
    check_same(trajectories, [SearchLoop(one_by_one, fake_search).run([request])[0] for request in requests])


def test_only_turns_that_a_tag_ended_are_aborted(make_model, make_engine, tokenizer, make_requests, fake_search):
    engine = make_engine(make_model(5), SamplingParams(1.0))
    trajectories = SearchLoop(engine, fake_search).run(make_requests(10, seed=5))
    stand_in = engine._generator
    turns = [(t, turn) for t in trajectories for turn in t.turns]
    assert len(stand_in.seeds) == len(set(stand_in.seeds)) == len(turns)
    assert 0 < len(stand_in.aborted) < len(turns)


def test_a_search_that_fails_leaves_nothing_behind(make_model, make_engine, make_requests, fake_search):
    engine = make_engine(make_model(4), SamplingParams(1.0))

    def fail(queries):
        raise OSError("no index")

    with pytest.raises(OSError, match="no index"):
        SearchLoop(engine, fail).run(make_requests(9, seed=4))
    assert not engine.has_work
    assert not engine._generator.requests
    assert SearchLoop(engine, fake_search).run(make_requests(3, seed=4))


def test_a_turns_seed_depends_on_the_sequences_seed_and_on_what_it_sampled(make_requests):
    keys = stream_keys([0, 1, 2])
    seeds = set()
    for request, key in zip(make_requests(3), keys, strict=True):
        sequence = Sequence(request, key)
        sequence.append_prompt([1, 2], "x")
        seeds.add(turn_seed(sequence))
        sequence.append_observation([3], "y")
        seeds.add(turn_seed(sequence))  # what the environment says changes nothing
        sequence.append_turn(np.array([4, 5]), np.zeros(2, dtype=np.float32))
        seeds.add(turn_seed(sequence))
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_vllm_sleeps_until_the_weights_are_handed_over(make_model, make_engine, config, make_requests, fake_search):
    model, requests = make_model(4), make_requests(3, seed=4)
    engine = make_engine(model, GREEDY)
    before = SearchLoop(engine, fake_search).run(requests)
    engine.free_cache()
    with pytest.raises(AssertionError, match="update_weights"):
        SearchLoop(engine, fake_search).run(requests)
    engine.update_weights()
    check_same(before, SearchLoop(engine, fake_search).run(requests))


# ----------------------------------------------------------------------------------------------------- the hand-over


def test_updated_weights_are_the_ones_that_generate(
    make_model, make_engine, tokenizer, config, make_requests, fake_search
):
    model, requests = make_model(3), make_requests(6, seed=3)
    engine = make_engine(model, GREEDY)
    before = SearchLoop(engine, fake_search).run(requests)
    with torch.no_grad():
        for parameter, new in zip(model.parameters(), make_model(5).parameters(), strict=True):
            parameter.copy_(new)
    check_same(before, SearchLoop(engine, fake_search).run(requests))  # a copy: nothing has changed yet
    engine.update_weights()
    after = SearchLoop(engine, fake_search).run(requests)
    check_same(after, SearchLoop(Engine(model, tokenizer, config, GREEDY), fake_search).run(requests))
    assert any(len(a.token_ids) != len(b.token_ids) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_that_is_forgotten_is_missed(make_model, make_engine, tied):
    model = tie(make_model(4), tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    make_engine(model)
    names = [name for name, _ in named_weights(model)]
    assert len(names) == len(set(names)) == len(list(model.parameters())) + tied
    assert "lm_head.weight" in names
    harmless = {f"model.layers.{layer}.self_attn.k_proj.bias" for layer in (0, 1)}  # mostly cancels in the softmax
    for name in names:
        if name not in harmless:
            with pytest.raises(ValueError, match="has not got the trainer's weights.*rollout.engine=native"):
                make_engine(model, lost=[name])


def tie(model: Decoder, tied: bool) -> Decoder:
    """The same weights, or with the head for an embedding."""
    if not tied:
        return model
    other = Decoder(replace(model.config, tie_word_embeddings=True))
    state = {**model.state_dict(), "model.embed_tokens.weight": model.head_weight}
    other.load_state_dict({**state, "lm_head.weight": model.head_weight})
    return other


def test_the_check_scores_each_sequence_by_itself_and_knows_nan(make_model, tokenizer):
    model = make_model(4)
    known = known_sequences(tokenizer, model.config.vocab_size, 20)
    assert {len(token_ids) for token_ids in known} == {20, len(tokenizer.encode(format_observation([])))}
    assert {token for token_ids in known[2:] for token in token_ids} >= {0, model.config.vocab_size - 1}
    scores = [score(model, [token_ids]) for token_ids in known]
    np.testing.assert_allclose(np.concatenate(scores), score(model, known), atol=1e-5)
    check_handover(model, known, scores, "it")
    scores[1] = np.full_like(scores[1], np.nan)
    with pytest.raises(ValueError, match="it has not got"):
        check_handover(model, known, scores, "it")


def test_weights_that_stay_behind_are_noticed_before_they_have_gone_far(make_model, make_engine):
    """Small updates, of which the receiver takes none: far within the tolerance, and no agreement."""
    model = make_model(4)
    engine = make_engine(model)
    engine.update_weights()  # the same weights once more: nothing has moved, and nothing should
    generator = torch.Generator().manual_seed(0)
    moves = [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]

    @torch.no_grad()
    def update():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.add_(move, alpha=2e-6)

    update()
    engine.update_weights()
    engine._generator.load = lambda weights: None
    update()
    differences = np.concatenate(engine._generator.score(engine._known)) - score(model, engine._known)
    assert np.abs(differences).mean() < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="still has the weights of an earlier step.*rollout.engine=native"):
        engine.update_weights()


def test_a_standstill_is_measured_from_the_last_change(make_model, tokenizer):
    """Steps too small to tell, one by one; not all together."""
    model = make_model(4)
    known = known_sequences(tokenizer, model.config.vocab_size, 20)
    stale = [score(model, [token_ids]) for token_ids in known]
    before = check_handover(model, known, stale, "it")

    def update(times):
        for _ in range(times):
            with torch.no_grad():
                model.head_weight.mul_(1 + 5e-7)
            assert check_handover(model, known, stale, "it", before) is before

    update(1)
    with pytest.raises(ValueError, match="it still has"):
        update(100)


def test_an_engine_that_cannot_start_is_closed(make_model, tokenizer, config):
    model = make_model(4)
    stand_in = StandIn(model, tokenizer.eos_ids, lost=["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="has not got the trainer's weights"):
        VllmEngine(model, tokenizer, config, generator=stand_in)
    assert stand_in.requests is None


# --------------------------------------------------------------------------------------------------- what can be asked


def test_the_reported_logprobs_are_ours_or_refused():
    cut = SamplingParams(1.0, top_p=0.9, top_k=20)
    assert logprobs_mode(SamplingParams(0.7)) == logprobs_mode(GREEDY) == "processed_logprobs"
    assert logprobs_mode(cut) == "raw_logprobs"
    with pytest.raises(ValueError, match="temperature other than 1"):
        logprobs_mode(SamplingParams(0.7, top_k=20))
    for mode, sampling, expected in [
        ("processed_logprobs", SamplingParams(0.7), True),
        ("processed_logprobs", GREEDY, True),
        ("processed_logprobs", cut, False),
        ("raw_logprobs", cut, True),
        ("raw_logprobs", GREEDY, True),
        ("raw_logprobs", SamplingParams(0.7), False),
    ]:
        assert is_reported(mode, sampling) is expected


def test_the_configuration_refuses_what_vllm_cannot_report():
    assert RolloutConfig(engine="vllm", top_p=0.9).top_p == 0.9
    with pytest.raises(ValueError, match="rollout.temperature=1"):
        load_config(None, ["rollout.engine=vllm", "rollout.top_k=20", "rollout.temperature=0.7"])


def test_without_vllm_the_message_says_what_to_do(monkeypatch, make_model, tokenizer):
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = Config.model_validate({"rollout": {"engine": "vllm", "max_sequence_tokens": 200}})
    with pytest.raises(ValueError, match="vllm cannot be imported.*rollout.engine=native"):
        build_engine(make_model(0), tokenizer, config)


# ------------------------------------------------------------------------------------------------------- the real one


def only_with_vllm(test):
    """Skip where vLLM is not installed."""
    is_there = importlib.util.find_spec("vllm") is not None
    reason = "vllm is not installed; docs/architecture.md says how, in an environment of its own"
    return pytest.mark.skipif(not is_there, reason=reason)(test)


BUDGETS = dict(
    engine="vllm", max_searches=2, max_turn_tokens=48, max_observation_tokens=80, max_sequence_tokens=320,
    max_num_seqs=16,
)  # fmt: skip
NAMES = ("Anna Bell", "Carl Dorn", "Emma Frey", "Gustav Holm", "Ida Jansen", "Karl Lund")


def search_letters(queries):
    return [[Passage(query, query, f"{query} was born in the town of {query[::-1]}.")] for query in queries]


def requests_for(config: Config, tokenizer, group_size: int = 1) -> list[RolloutRequest]:
    prompt = PromptBuilder(config.prompt, tokenizer)
    questions = [Question(name, f"Where was {name} born?", ("x",), "test") for name in NAMES]
    return [
        RolloutRequest(question, group, prompt(question), seed=100 * group + i)
        for group, question in enumerate(questions)
        for i in range(group_size)
    ]


@pytest.fixture
def base():
    """The built-in model, its tokenizer, and a configuration with vLLM."""
    config = Config.model_validate({"prompt": {"template": "plain"}, "rollout": BUDGETS})
    return load_model("builtin:base"), load_tokenizer("builtin:base"), config


@pytest.fixture
def open_engine():
    """model, tokenizer, configuration -> an engine that is closed after the test."""
    with ExitStack() as stack:

        def open_(*arguments):
            engine = build_engine(*arguments)
            stack.callback(engine.close)
            return engine

        yield open_


def check_kept(statistics, trajectories) -> None:
    """Of an earlier turn's tokens only a block that is not full is computed again, and not the whole context."""
    later = [turn for trajectory in trajectories for turn in trajectory.turns[1:]]
    assert statistics.num_recomputed_tokens <= len(later) * CPU_BLOCK < sum(turn.start for turn in later)


@only_with_vllm
def test_vllm_writes_what_the_native_engine_writes(base, open_engine):
    """Greedily the same tokens; sampled, the trainer's log-probabilities, and the same tokens in any batch."""
    model, tokenizer, config = base
    num_threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    engine = open_engine(model, tokenizer, config)
    assert torch.set_num_threads is set_num_threads
    assert torch.get_num_threads() == num_threads
    loop, requests = SearchLoop(engine, search_letters), requests_for(config, tokenizer, group_size=2)
    engine.sampling = GREEDY
    greedy = loop.run(requests)
    check_same(greedy, SearchLoop(Engine(model, tokenizer, config.rollout, GREEDY), search_letters).run(requests))
    assert sum(len(trajectory.turns) for trajectory in greedy) > len(greedy)
    check_kept(loop.statistics, greedy)
    engine.sampling = SamplingParams(0.8)
    sampled = loop.run(requests)
    check_logprobs(model, sampled, 0.8)
    assert any(len(a.token_ids) != len(b.token_ids) for a, b in zip(sampled[::2], sampled[1::2], strict=True))
    engine.update_weights()  # empties the prefix cache
    check_same(sampled[::-1], loop.run(requests[::-1]))
    check_same(sampled[:1], loop.run(requests[:1]))
    engine.sampling = SamplingParams(1.0, top_k=5)
    with pytest.raises(ValueError, match="rollout.engine=native"):
        loop.run(requests[:1])
    assert not engine.has_work


@only_with_vllm
def test_vllm_reports_the_whole_vocabulary_where_sampling_is_cut(base, open_engine):
    model, tokenizer, config = base
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"top_k": 3, "top_p": 0.9})})
    engine = open_engine(model, tokenizer, config)
    trajectories = SearchLoop(engine, search_letters).run(requests_for(config, tokenizer))
    check_logprobs(model, trajectories, 1.0)
    for trajectory in trajectories:  # and it is cut: nothing but the three likeliest
        ids = torch.from_numpy(trajectory.token_ids)
        with torch.no_grad():
            logits = model.logits(ids, torch.tensor([0, len(ids)]))[:-1]
        ranks = (logits > logits.gather(1, ids[1:, None])).sum(-1)
        assert ranks[torch.from_numpy(trajectory.loss_mask[1:])].max() < 3


@only_with_vllm
def test_vllm_takes_new_weights_and_misses_a_forgotten_head(base, open_engine, monkeypatch):
    model, tokenizer, config = base
    engine = open_engine(model, tokenizer, config)
    engine.sampling = GREEDY
    loop, requests = SearchLoop(engine, search_letters), requests_for(config, tokenizer)
    before = loop.run(requests)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    monkeypatch.setattr(vllm_engine, "named_weights", lambda model: model.named_parameters())
    with pytest.raises(ValueError, match="has not got the trainer's weights"):
        engine.update_weights()
    monkeypatch.undo()
    engine.update_weights()
    after = loop.run(requests)
    check_same(after, SearchLoop(Engine(model, tokenizer, config.rollout, GREEDY), search_letters).run(requests))
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(before, after, strict=True))


@pytest.fixture
def small_demo(tmp_path):
    """The demo with vLLM: two steps of four questions."""
    overrides = [
        *("rollout.engine=vllm", f"run.directory={tmp_path}", "run.device=cpu", "run.num_threads=1"),
        *("run.tensorboard=false", "data.world.num_entities=60", "data.world.num_questions=64", "train.num_steps=2"),
        *("train.questions_per_step=4", "train.eval_every=0", "checkpoint.every=0", "rollout.max_num_seqs=32"),
        "eval.sets={unseen: {world: {split: eval, num_entities: 60, num_questions: 12}}}",
    ]
    return load_config("configs/demo.yaml", overrides)


def check_trained(config: Config, result: dict) -> None:
    """Both steps, on the policy as it was: the sampler's log-probabilities and the trainer's are the same."""
    rows = [json.loads(line) for line in (config.run_directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    updated = [row for row in rows[1:] if row["policy_tokens"]]
    assert updated
    for row in updated:
        assert abs(row["rollout_policy_kl"]) < 1e-6
        assert row["logprob_difference_max"] < 1e-4
    assert result["after"]["unseen"]["count"] == 12


@only_with_vllm
def test_the_demo_trains_with_vllm(small_demo):
    check_trained(small_demo, train(small_demo, Console(quiet=True)))


@only_with_vllm
def test_two_ranks_train_with_an_engine_each(small_demo, tmp_path):
    (tmp_path / "demo.yaml").write_text(small_demo.to_yaml())
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(root / "tests" / "two_ranks.py"), str(tmp_path), str(tmp_path / "demo.yaml")],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text())["trained"][0] for rank in range(2))
    assert first == second
    check_trained(small_demo, first)
