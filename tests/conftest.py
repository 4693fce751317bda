"""Shared by the tests of the trainer: a tiny model that writes well-formed turns and guesses answers, and its world.

The model is pre-trained for a few seconds, once per session, on turns whose answers are random letters. Rollouts
therefore search and answer from the first step, rewards vary, and there is something to learn.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import environment
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from searchr1_fast.config import Config
from searchr1_fast.console import Console
from searchr1_fast.models import Decoder, DecoderConfig, TextTokenizer, save_model
from searchr1_fast.protocol import format_observation
from searchr1_fast.types import FinishReason, Passage, Question, Trajectory

TAGS = ("<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>")
LETTERS = "bcde"  # not "a": normalisation takes it for an article
NUM_QUESTIONS = 8
NUM_PRETRAINING_STEPS = 150
TWO_RANKS_SECONDS = 400  # before a launch is given up; two cores take half a minute

# A slow example is not a failure on a machine that others use.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_finish():
    """Freeze what was imported, so that garbage collections need not walk over it.

    The benchmarks collect before every measurement; their tests took half as long again (93 s of a CPU, not 64;
    November 2026).
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let the last collection walk over it again, or extensions would report leaks below the summary."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def on_two_ranks():
    """script, arguments -> None; torchrun runs it on two ranks of the CPU (or `num_ranks`), and it must succeed."""

    def run(script: Path, *arguments: str | Path, num_ranks: int = 2) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        child = subprocess.Popen(
            [*launcher, str(num_ranks), str(script), *map(str, arguments)],
            env=environment(OMP_NUM_THREADS="1"),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, said = child.communicate(timeout=TWO_RANKS_SECONDS)
        finally:
            if child.poll() is None:
                child.terminate()  # not kill: only the launcher ends its ranks
                child.communicate()
        assert child.returncode == 0, said[-4000:]

    return run


def build_tokenizer() -> TextTokenizer:
    """A tokenizer of all bytes, with one token per tag."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {character: index for index, character in enumerate(sorted(alphabet))}
    merges = []
    for tag in TAGS:
        for end in range(2, len(tag) + 1):
            if tag[:end] not in vocab:
                vocab[tag[:end]] = len(vocab)
                merges.append((tag[: end - 1], tag[end - 1]))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return TextTokenizer(backend, eos_token="<|end|>")


def build_decoder(vocab_size: int, seed: int, tied: bool, hidden_size: int = 32) -> Decoder:
    """A decoder with random weights."""
    torch.manual_seed(seed)
    return Decoder(
        DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.1,
        )
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> TextTokenizer:
    return build_tokenizer()


@pytest.fixture
def make_decoder(tiny_tokenizer):
    """seed, tied -> random decoder."""
    return lambda seed=0, tied=False: build_decoder(tiny_tokenizer.vocab_size, seed, tied)


def passage(index: int) -> Passage:
    return Passage(str(index), f"k{index}", f"says {LETTERS[index % 4]}")


def question(index: int) -> Question:
    """Question i is answered by letter i mod 4; even and odd ones are of two kinds."""
    return Question(f"q{index}", f"k{index}", (LETTERS[index % 4],), "letters", ("even", "odd")[index % 2])


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory, tiny_tokenizer) -> Path:
    """A Hugging Face directory with the pre-trained tiny model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("model")
    model = build_decoder(tiny_tokenizer.vocab_size, seed=0, tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    generator = np.random.default_rng(0)
    for _ in range(NUM_PRETRAINING_STEPS):
        sequences = [_demonstration(generator, tiny_tokenizer) for _ in range(16)]
        lengths = torch.tensor([0, *(len(ids) for ids, _ in sequences)])
        tokens = torch.tensor([token for ids, _ in sequences for token in ids])
        learned = torch.tensor([flag for _, flags in sequences for flag in flags])
        logits = model.logits(tokens, lengths.cumsum(0))[:-1]
        loss = torch.nn.functional.cross_entropy(logits[learned[1:]], tokens[1:][learned[1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model, directory)
    tiny_tokenizer.save(directory)
    torch.set_num_threads(before)
    return directory


def _demonstration(generator: np.random.Generator, tokenizer: TextTokenizer) -> tuple[list[int], list[bool]]:
    """Token ids and whether each is learned: a search half of the time, then a random letter."""
    index = int(generator.integers(NUM_QUESTIONS))
    pieces = [(f"{question(index).text}?", False)]
    if generator.random() < 0.5:
        found = passage(int(generator.integers(NUM_QUESTIONS)))
        pieces += [(f"<search>{question(index).text}</search>", True), (format_observation([found]), False)]
    pieces.append((f"<answer>{LETTERS[generator.integers(4)]}</answer>", True))
    ids: list[int] = []
    flags: list[bool] = []
    for text, flag in pieces:
        new = tokenizer.encode(text)
        ids, flags = ids + new, flags + [flag] * len(new)
    return ids, flags


@pytest.fixture
def make_config(tiny_model_directory, tmp_path):
    """Changes by section -> a configuration of the letters: `make_config(train={"num_steps": 3})`."""
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    rows = [{"id": p.id, "contents": f'"{p.title}"\n{p.text}'} for p in map(passage, range(NUM_QUESTIONS))]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"id": q.id, "question": q.text, "golden_answers": list(q.golden_answers), "type": q.kind}
        for q in map(question, range(NUM_QUESTIONS))
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run": {
            "name": "tiny",
            "directory": str(tmp_path / "runs"),
            "device": "cpu",
            "num_threads": 1,
            "tensorboard": False,
            "trajectories_every": 0,
        },
        "model": {"path": str(tiny_model_directory)},
        "prompt": {"template": "{question}?"},
        "data": {"questions": str(questions), "corpus": str(corpus)},
        "retrieval": {"topk": 1},
        "rollout": {
            "max_searches": 1,
            "max_turn_tokens": 12,
            "max_observation_tokens": 80,
            "max_sequence_tokens": 200,
            "max_num_seqs": 64,
        },
        "algorithm": {"group_size": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "train": {"num_steps": 2, "questions_per_step": 6, "tokens_per_microbatch": 300, "eval_every": 0},
        "eval": {"sets": {"letters": {"questions": str(questions)}}},
        "checkpoint": {"every": 0},
    }

    def make(**changes: dict) -> Config:
        return Config.model_validate(
            {key: settings.get(key, {}) | changes.get(key, {}) for key in {*settings, *changes}}
        )

    return make


@pytest.fixture(scope="session")
def make_trajectory(tiny_tokenizer):
    """seed, [(is policy, length), …], the first a prompt -> random tokens, log-probs of a sampler that knows little."""
    vocab_size = tiny_tokenizer.vocab_size

    def make(seed: int, pieces: list[tuple[bool, int]], group: int = 0) -> Trajectory:
        generator = np.random.default_rng(seed)
        sizes = [length for _, length in pieces]
        mask = np.repeat(np.array([is_policy for is_policy, _ in pieces]), sizes)
        logprobs = np.where(mask, generator.normal(-np.log(vocab_size), 0.05, sum(sizes)), 0.0)
        return Trajectory(
            question=question(group),
            group=group,
            token_ids=generator.integers(0, vocab_size, sum(sizes)),
            loss_mask=mask,
            rollout_logprobs=logprobs.astype(np.float32),
            prompt_length=sizes[0],
            turns=[],
            finish_reason=FinishReason.ANSWER,
        )

    return make


class RecordingConsole(Console):
    """A silent console that keeps its notes. `on_step` is called with each step's metrics."""

    def __init__(self, on_step=None) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []
        self.on_step = on_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, metrics) -> None:
        if self.on_step is not None:
            self.on_step(metrics)


@pytest.fixture
def make_console():
    """on_step -> a silent console that keeps its notes."""
    return RecordingConsole


@pytest.fixture(scope="session")
def make_question():
    """index -> the question of the letters."""
    return question


@pytest.fixture
def launches(monkeypatch):
    """What a GPU would have been asked to launch during the test, recorded without one: see `launch_recording`."""
    pytest.importorskip("triton", reason="needs Triton")
    import launch_recording

    yield from launch_recording.recorded(monkeypatch)
