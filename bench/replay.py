"""Replay trajectories of several turns, with a search after each but the last, from a script: rollout.py's second part.

A seed sets how long each turn is and what it asks for, so every engine runs the same turns, whatever it samples. The
searches are real: BM25 over a generated encyclopedia, with all that asked at a step in one batch, and the passages
fitted into the observation's tokens as in the trainer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import rollout_engines as engines
import torch
from timeline import Timeline

from searchr1_fast.config import RetrievalConfig, RolloutConfig, WorldConfig
from searchr1_fast.models import Decoder, TextTokenizer
from searchr1_fast.retrieval import open_retriever
from searchr1_fast.rollout import Engine, VllmEngine
from searchr1_fast.rollout.observation import Text, fit_observation
from searchr1_fast.rollout.plain import PlainEngine
from searchr1_fast.rollout.sequence import Sequence as Rollout
from searchr1_fast.rollout.statistics import RolloutStatistics
from searchr1_fast.world import build_world

LOCK_STEP = "lock-step, re-prefilled"
RUN_ON = "lock-step, re-prefilled, turns run on"
TOPK = 5  # of the encyclopedia's articles, which have about 95 tokens


class RunOnEngine(PlainEngine):
    """The lock-step twin without stop tags, generating as the original does: a turn is sampled to `run_on` tokens, and
    then cut where the script ends it."""

    run_on = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept: dict[int, int] = {}  # by sequence

    def add(self, sequences: Iterable[Rollout]) -> None:
        """Add sequences as the twin does, with all turns of one length."""
        super().add([self._lengthened(sequence) for sequence in sequences])

    def resume(self, sequence: Rollout) -> None:
        """Resume as the twin does, with a turn of that length."""
        super().resume(self._lengthened(sequence))

    def _lengthened(self, sequence: Rollout) -> Rollout:
        self._kept[id(sequence)] = sequence.turn_limit
        sequence.turn_limit = self.run_on
        return sequence

    def _num_kept(self, sequence: Rollout, token_ids: np.ndarray) -> int:  # [n] int64
        return self._kept[id(sequence)]


class Script:
    """What happens in every trajectory, and the corpus that is searched."""

    def __init__(self, options: argparse.Namespace, vocab_size: int, tokenizer: TextTokenizer) -> None:
        generator = np.random.default_rng(1)
        shape = (options.trajectories, options.searches + 1)
        shortest = options.turn_tokens // 4
        self.limits = generator.integers(shortest, 2 * options.turn_tokens - shortest, shape)  # tokens of each turn
        self.prompts = generator.integers(0, vocab_size, (options.trajectories, options.prompt_tokens))
        world = build_world(WorldConfig(style="rich", num_questions=0))
        titles = [passage.title for passage in world.passages]
        self.queries = generator.choice(titles, (options.trajectories, options.searches))
        self.retriever = open_retriever(RetrievalConfig(backend="bm25"), world.passages)
        self.tokenizer, self.observation_tokens = tokenizer, options.observation_tokens
        longest = int(self.limits.sum(1).max()) + options.prompt_tokens + options.searches * options.observation_tokens
        self.config = RolloutConfig(
            max_num_seqs=options.max_num_seqs,
            max_turn_tokens=int(self.limits.max()),
            max_sequence_tokens=longest,
            keep_cache=True,
        )

    @property
    def num_searches(self) -> int:
        """The number of searches of a trajectory."""
        return self.queries.shape[1]

    def search(self, places: Sequence[int], turns: Sequence[int]) -> list[Text]:
        """Return what trajectories are told that search at the end of these turns."""
        queries = [str(self.queries[place, turn]) for place, turn in zip(places, turns, strict=True)]
        found = self.retriever.search(queries, TOPK)
        return [fit_observation(passages, self.tokenizer, self.observation_tokens) for passages in found]

    def observe(self, asking: list[tuple[Rollout, int, int]]) -> None:
        """Search for sequences, each given with its place and turn number, and give them their next turn."""
        sequences, places, turns = zip(*asking, strict=True)
        for sequence, place, turn, text in zip(sequences, places, turns, self.search(places, turns), strict=True):
            sequence.append_observation(text.token_ids, text.text)
            sequence.turn_limit = int(self.limits[place, turn + 1])


def play(engine: Engine | VllmEngine, script: Script) -> tuple[list[np.ndarray], dict[str, Any], Timeline]:
    """-> the tokens of every trajectory, what was computed for them, and when each was generated."""
    engine.statistics = RolloutStatistics()
    sequences = engines.make_sequences(script.prompts, script.limits[:, 0].tolist())
    places = {id(sequence): place for place, sequence in enumerate(sequences)}
    turns, seconds = [0] * len(sequences), 0.0
    num_asked = sum(sequence.length for sequence in sequences)  # tokens before each turn
    timeline = Timeline()
    for place in range(len(sequences)):
        timeline.begin_turn(place)
    engine.add(sequences)
    while engine.has_work:
        asking = []
        with timeline.watching(engine):
            ended = engine.step()
        for sequence in ended:
            place = places[id(sequence)]
            timeline.end_turn(place, sequence)
            if turns[place] == script.num_searches:
                engine.release(sequence)
            else:
                asking.append((sequence, place, turns[place]))
            turns[place] += 1
        if asking:
            started = timeline.now()
            script.observe(asking)
            seconds += timeline.now() - started
            timeline.search([place for _, place, _ in asking], started)
        for sequence, place, _ in asking:
            num_asked += sequence.length
            timeline.begin_turn(place)
            engine.resume(sequence)
    statistics = engine.statistics
    work = {
        "tokens_computed": statistics.num_prefill_tokens + statistics.num_decode_tokens,
        "tokens_that_exist": sum(sequence.length - 1 for sequence in sequences),  # nothing attends to the last
        "cache_hit_share": 1 - statistics.num_prefill_tokens / num_asked,
        "search_seconds": seconds,
    }
    return [sequence.tokens_from(0) for sequence in sequences], work | timeline.summary(), timeline


class Generate:
    """transformers' `generate` in lock-step: at every turn it gets all contexts again, padded on the left, until the
    longest turn ends. It takes `max_num_seqs` trajectories at a time."""

    def __init__(self, model: Decoder, dtype: torch.dtype, script: Script) -> None:
        self._other, self._script = engines.transformers_model(model, dtype), script
        self.num_computed = 0  # tokens of the last run, padding included

    def run(self) -> list[np.ndarray]:
        """Run the script -> the tokens of every trajectory."""
        self.num_computed, size = 0, self._script.config.max_num_seqs
        everyone = range(len(self._script.prompts))
        return [tokens for begin in everyone[::size] for tokens in self._play(everyone[begin : begin + size])]

    def _play(self, places: range) -> list[np.ndarray]:
        contexts = list(self._script.prompts[places.start : places.stop])
        for turn in range(self._script.num_searches + 1):
            written = self._write(contexts, self._script.limits[places.start : places.stop, turn])
            contexts = [np.concatenate(pair) for pair in zip(contexts, written, strict=True)]
            if turn < self._script.num_searches:
                told = self._script.search(places, [turn] * len(places))
                contexts = [np.append(tokens, text.token_ids) for tokens, text in zip(contexts, told, strict=True)]
        return contexts

    def _write(self, contexts: list[np.ndarray], limits: np.ndarray) -> list[np.ndarray]:
        """Generate a turn of `limits` tokens after each context."""
        from transformers import StoppingCriteriaList

        width, most, device = max(map(len, contexts)), int(limits.max()), self._other.device
        ids, mask = (torch.zeros(len(contexts), width, dtype=torch.int64) for _ in range(2))
        for row, tokens in enumerate(contexts):
            ids[row, width - len(tokens) :] = torch.from_numpy(tokens)
            mask[row, width - len(tokens) :] = 1
        ends = width + torch.from_numpy(limits).to(device)
        output = self._other.generate(
            ids.to(device), attention_mask=mask.to(device), do_sample=True, top_k=0, max_new_tokens=most,
            use_cache=True, stopping_criteria=StoppingCriteriaList([lambda ids, _, **__: ids.shape[1] >= ends]),
        )  # fmt: skip
        self.num_computed += len(contexts) * (width + most - 1)
        return [tokens[width : width + limit].cpu().numpy() for tokens, limit in zip(output, limits, strict=True)]


def replay_providers(
    model: Decoder,
    tokenizer: TextTokenizer,
    options: argparse.Namespace,
    work: dict[str, Any],
    timelines: dict[str, Timeline],
    stack: ExitStack,
) -> dict[str, engines.Provider]:
    """Make the native engine, its lock-step twin, transformers, and vLLM where it is installed. `stack` ends them.

    For the last run of each, `work` gets what it computed and what vLLM's hand-over before it took, and `timelines`
    gets when.
    """
    script = Script(options, model.config.vocab_size, tokenizer)

    def player(name: str, engine: Engine | VllmEngine) -> engines.Provider:
        report: dict[str, float] = {}

        def run() -> list[np.ndarray]:
            tokens, done, timelines[name] = play(engine, script)
            work[name] = done | report
            return tokens

        # Before the clock starts: vLLM's hand-over empties the cache, which holds the last run's contexts.
        return engines.Provider(run, lambda: report.update(engine.update_weights()))

    providers = {}
    for name, kind in ((engines.OURS, Engine), (LOCK_STEP, PlainEngine)):
        providers[name] = player(name, engines.native_engine(kind, model, tokenizer, script.config, temperature=1.0))
    if options.run_on:
        longer = script.config.max_sequence_tokens + options.run_on
        config = script.config.model_copy(update={"max_turn_tokens": options.run_on, "max_sequence_tokens": longer})
        RunOnEngine.run_on = options.run_on
        providers[RUN_ON] = player(RUN_ON, engines.native_engine(RunOnEngine, model, tokenizer, config, 1.0))
    for dtype in engines.other_types(model)[1:]:
        name, other = f"{engines.OURS}, {engines.type_name(dtype)}", engines.in_type(model, dtype)
        providers[name] = player(name, engines.native_engine(Engine, other, tokenizer, script.config, temperature=1.0))
    for dtype in engines.other_types(model):
        providers[f"transformers generate, {engines.type_name(dtype)}"] = generate_provider(model, dtype, script, work)
    for dtype in engines.other_types(model) if engines.HAS_VLLM else ():
        name = f"vLLM, {engines.type_name(dtype)}"
        other = engines.vllm_engine(engines.in_type(model, dtype), tokenizer, script.config, 1.0, stack)
        providers[name] = player(name, other)
    return providers


def generate_provider(model: Decoder, dtype: torch.dtype, script: Script, work: dict[str, Any]) -> engines.Provider:
    """Make `Generate` a provider. `work` gets what the last run computed."""
    generate = Generate(model, dtype, script)

    def run() -> list[np.ndarray]:
        tokens = generate.run()
        exist = sum(len(one) - 1 for one in tokens)
        work[f"transformers generate, {engines.type_name(dtype)}"] = {
            "tokens_computed": generate.num_computed, "tokens_that_exist": exist,
        }  # fmt: skip
        return tokens

    return engines.Provider(run)


def describe(name: str, one: dict[str, Any]) -> str:
    """Write a line about the work of one provider."""
    share = one["tokens_computed"] / one["tokens_that_exist"]
    computed = f"{name}: {one['tokens_computed']:,} tokens computed, {share:.2f} of those that exist"
    if "cache_hit_share" not in one:  # not an engine of ours
        return computed
    return (
        f"{computed}; {one['cache_hit_share']:.3f} of the contexts were cached; {one['search_seconds']:.2f} s of "
        f"searching; a trajectory took {one['latency_p50']:.1f} s (99 %: {one['latency_p99']:.1f} s), "
        f"{one['idle_share']:.0%} idle"
    )
