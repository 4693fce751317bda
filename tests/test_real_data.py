"""`searchr1 train` on real questions over real passages, with a Hugging Face directory that transformers wrote.

The model is small and random, and is taught in a few seconds to search for something and to answer yes or no. Real
passages are therefore searched from the first step, and the rewards of the set's yes-or-no questions vary.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
import yaml

from searchr1_fast.cli import main
from searchr1_fast.data import read_corpus
from searchr1_fast.models import load_model, load_tokenizer
from searchr1_fast.protocol import OBSERVATION_CLOSE, OBSERVATION_OPEN, format_observation

DATA = Path(os.environ.get("SEARCHR1_DATA", Path(__file__).parents[2] / "shared" / "data"))
QUERIES = ("director of the film", "date of birth", "where was the father born", "spouse of the king")
# The least that the object of a step has.
KEYS = """
step reward_mean em searches_mean response_tokens_mean policy_tokens kept_fraction entropy kl_ref rollout_policy_kl
clip_fraction grad_norm lr trajectories_per_second tokens_per_second time_rollout time_search_wait time_ref time_update
time_sync time_step
"""


def data_file(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {path}; set SEARCHR1_DATA to the directory that holds {name}")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    """A Qwen2 model with grouped-query attention and a byte-level BPE tokenizer, saved by transformers."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    questions = [row["question"] for row in read_jsonl(data_file("qa/2wiki_dev.jsonl"))]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(questions, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=608,  # larger than the tokenizer's, as published models have it
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config)
    teach(model, tokenizer, questions)
    directory = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    torch.set_num_threads(threads)
    return directory


def teach(model, tokenizer, questions: list[str]) -> None:
    """Train until the model itself writes a search for one of a few things and, after an observation, yes or no."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    generator = random.Random(0)
    for _ in range(100):
        rows, labels = [], []
        for _ in range(8):
            pieces = [
                (f"Question: {generator.choice(questions)}\n", False),
                (f"<search> {generator.choice(QUERIES)} </search>", True),
                (f"{OBSERVATION_OPEN}{generator.choice(questions)}{OBSERVATION_CLOSE}", False),
                (f"<answer> {generator.choice(('yes', 'no'))} </answer>", True),
            ]
            encoded = [(tokenizer.encode(text, add_special_tokens=False), learned) for text, learned in pieces]
            rows.append(torch.tensor([i for ids, _ in encoded for i in ids]))
            labels.append(torch.tensor([i if learned else -100 for ids, learned in encoded for i in ids]))
        pad = torch.nn.utils.rnn.pad_sequence
        loss = model(
            pad(rows, batch_first=True), labels=pad(labels, batch_first=True, padding_value=-100)
        ).loss  # right-padded: causal attention never sees the padding
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model_directory) -> Path:
    """Three steps with an evaluation, then resumed up to five, all through the command line."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("real")
    settings = {
        "run": {"name": "real", "directory": str(folder), "device": "cpu", "num_threads": 1, "trajectories_every": 1},
        "model": {"path": str(model_directory)},
        "data": {"questions": str(data_file("qa/2wiki_dev.jsonl")), "corpus": str(data_file("corpus/2wiki.jsonl"))},
        "retrieval": {"backend": "bm25", "topk": 3},
        "rollout": {
            "max_searches": 2,
            "max_turn_tokens": 32,
            "max_observation_tokens": 300,
            "max_sequence_tokens": 900,
        },
        "algorithm": {"name": "grpo", "group_size": 4, "kl_coefficient": 0.01},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"num_steps": 3, "questions_per_step": 8, "tokens_per_microbatch": 4096, "eval_every": 2},
        "eval": {"sets": {"dev": {"questions": str(data_file("qa/2wiki_dev.jsonl")), "limit": 20}}},
        "checkpoint": {"every": 2},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["train", str(config)]) == 0
    assert [row["step"] for row in read_jsonl(folder / "real" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert main(["train", str(config)]) == 2  # the folder holds a run
    assert main(["train", str(config), "train.num_steps=5", "--resume"]) == 0
    torch.set_num_threads(threads)
    return folder / "real"


def test_metrics_have_every_key_and_every_step(run_folder):
    rows = read_jsonl(run_folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    for row in rows[1:]:
        assert not set(KEYS.split()) - row.keys()
        assert row["searches_mean"] > 0.5
        assert row["time_step"] >= row["time_rollout"] > 0
    assert any(row["policy_tokens"] > 0 and row["grad_norm"] > 0 for row in rows[1:])
    assert sum(row["reward_mean"] for row in rows[1:]) > 0  # some yes-or-no questions were right
    for step in (0, 2, 3, 4, 5):  # before training, every second step, and the last step of each call
        for key in ("em", "f1", "searches_mean", "comparison/em"):
            assert f"eval/dev/{key}" in rows[step]
    assert "eval/dev/em" not in rows[1]


def test_trajectories_hold_real_passages(run_folder):
    """Title by title, the policy was shown what the corpus holds under the ids that its turns name."""
    passages = {passage.id: passage for passage in read_corpus(data_file("corpus/2wiki.jsonl"))}
    titles = {passage.title for passage in passages.values()}
    num_whole = num_shown = 0
    for step in range(1, 6):
        trajectories = read_jsonl(run_folder / "trajectories" / f"step_{step:06d}.jsonl")
        assert len(trajectories) == 32
        for trajectory in trajectories:
            observations = [text for kind, text in trajectory["segments"] if text.startswith(OBSERVATION_OPEN)]
            searches = [turn for turn in trajectory["turns"] if turn["passage_ids"]]
            assert len(observations) == len(searches) == trajectory["num_searches"]
            for text, turn in zip(observations, searches, strict=True):
                found = [passages[i] for i in turn["passage_ids"]]
                assert len(found) == 3
                shown = re.findall(r'^(?:\n\n<information>)?Doc \d+\(Title: "(.*?)"\) ', text, re.MULTILINE)
                assert shown == [passage.title for passage in found[: len(shown)]]
                assert set(shown) <= titles
                assert text.endswith(OBSERVATION_CLOSE)
                num_whole += text == format_observation(found[: len(shown)])
                num_shown += 1
    assert num_shown > 100
    assert num_whole > 0.5 * num_shown  # the others were cut to the token budget


def test_the_export_is_the_same_model_to_transformers(run_folder, model_directory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = run_folder / "checkpoints" / "latest" / "hf"
    theirs, ours = AutoModelForCausalLM.from_pretrained(export), load_model(export)
    text = f"Question: {read_jsonl(data_file('qa/2wiki_dev.jsonl'))[0]['question']}\n<search> date of birth </search>"
    ids = AutoTokenizer.from_pretrained(export)(text, add_special_tokens=False)["input_ids"]
    assert ids == load_tokenizer(export).encode(text) == load_tokenizer(model_directory).encode(text)
    assert AutoTokenizer.from_pretrained(export).eos_token == "<|endoftext|>"
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
        actual = ours.logits(torch.tensor(ids), torch.tensor([0, len(ids)]))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    started = load_model(model_directory).state_dict()
    assert any(not torch.equal(tensor, started[name]) for name, tensor in ours.state_dict().items())


def test_the_run_can_be_scored_alone(run_folder, tmp_path, capsys):
    """`searchr1 eval` on the run folder scores question by question, and gives the last row's score."""
    answers = tmp_path / "answers.jsonl"
    code = main(["eval", str(run_folder / "config.yaml"), "--model", str(run_folder), "--output", str(answers)])
    assert code == 0, capsys.readouterr().err
    rows = read_jsonl(answers)
    assert len(rows) == 20
    last = read_jsonl(run_folder / "metrics.jsonl")[-1]
    assert sum(row["em"] for row in rows) / len(rows) == pytest.approx(last["eval/dev/em"])
    assert {row["kind"] for row in rows} <= {"compositional", "comparison", "bridge_comparison", "inference"}
