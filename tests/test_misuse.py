"""Mistakes that users make: each gives one sentence that says what, where and what to do, and nothing is started.

What can be wrong in a single file or key is tested with its reader; this tests what `searchr1 train` says.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from searchr1_fast.models import Decoder, DecoderConfig, load_model, save_model
from searchr1_fast.models.weights import INDEX
from searchr1_fast.train import main

NUM_SHARDS = 4


@pytest.fixture
def train(make_config, tmp_path, capsys):
    """overrides -> exit code and stderr on one line, of a run that starts from the tiny model."""
    config = make_config(train={"num_steps": 1}, eval={"sets": {}})
    (tmp_path / "config.yaml").write_text(config.to_yaml())

    def run(*overrides: str, file: Path | None = None) -> tuple[int, str]:
        code = main([str(file or tmp_path / "config.yaml"), *overrides])
        return code, " ".join(capsys.readouterr().err.split())

    return run


@pytest.fixture
def model(tiny_model_directory, tmp_path) -> Path:
    """A copy of the tiny model, which a test may damage."""
    return Path(shutil.copytree(tiny_model_directory, tmp_path / "model"))


@pytest.fixture
def shards(model) -> list[Path]:
    """The weight files of the copy, saved in shards."""
    whole = load_model(model)
    (model / "model.safetensors").unlink()
    save_model(whole, model, max_shard_bytes=30_000)
    files = sorted(model.glob("model-*.safetensors"))
    assert len(files) >= NUM_SHARDS
    return files


def changed(path: Path, **values) -> None:
    """Change values in a JSON file; None removes a key."""
    known = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))


def assert_refused(result: tuple[int, str], *parts: str) -> None:
    code, said = result
    assert code == 2 and said.startswith("searchr1: error: ") and "Traceback" not in said, said
    for part in parts:
        assert part in said, said


# ------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), ["model' is not a Hugging Face directory: it has no config.json"]),
        (lambda path: path.write_text("{"), ["model/config.json is not JSON"]),
        (lambda path: path.write_text("[]"), ["model/config.json must hold an object, not a list"]),
        (lambda path: changed(path, model_type="gpt2"), ["/model: config.json describes a 'gpt2' model; this decoder"]),
        (lambda path: changed(path, hidden_size=None), ["/model: config.json lacks hidden_size"]),
        (lambda path: changed(path, hidden_size="32"), ["hidden_size must be a whole number above 0, not '32'"]),
        (lambda path: changed(path, num_key_value_heads=0), ["num_key_value_heads must be a whole number above 0"]),
        (lambda path: changed(path, rms_norm_eps="1e-6"), ["rms_norm_eps must be a number above 0, not '1e-6'"]),
        (lambda path: changed(path, rope_scaling="linear", rope_parameters=None), ["must be an object, not 'linear'"]),
        (lambda path: changed(path, num_hidden_layers=3), ["does not fit its config.json: it lacks model.layers.2."]),
        (lambda path: changed(path, vocab_size=40), ["model.embed_tokens.weight is (", "config.json says (40, 32)"]),
    ],
)
def test_a_config_json(train, model, spoil, says):
    spoil(model / "config.json")
    assert_refused(train(f"model.path={model}"), *says)


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B", "builtin:large", "metrics.jsonl"])
def test_a_path_that_is_no_model(train, tmp_path, name):
    assert_refused(train(f"model.path={name}"), name)


def test_a_run_in_place_of_its_model(train, model, tmp_path):
    hf = tmp_path / "old" / "checkpoints" / "latest" / "hf"
    shutil.copytree(model, hf)
    assert_refused(train(f"model.path={tmp_path / 'old'}"), f"it is a run, whose newest model is {hf}")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda shards: shards[1].unlink(), ["has no model-00002-of-", f"which its {INDEX} names; copy the missing"]),
        (lambda shards: shards[1].write_bytes(shards[1].read_bytes()[:500]), ["model-00002-of-", "copy it again"]),
        (lambda shards: shards[1].write_text("version https://git-lfs"), ["model-00002-of-", "copy it again"]),
        (lambda shards: shards[1].write_bytes(shards[2].read_bytes()), ["does not fit its config.json: it lacks "]),
        (lambda shards: (shards[0].parent / INDEX).unlink(), [f"has no model.safetensors and no {INDEX}"]),
        (lambda shards: (shards[0].parent / INDEX).write_text("{}"), ["is not an index of weights"]),
        (lambda shards: changed(shards[0].parent / INDEX, weight_map={"a": 7}), ["is not an index of weights"]),
    ],
)
def test_shards(train, model, shards, spoil, says):
    spoil(shards)
    assert_refused(train(f"model.path={model}"), *says)


@pytest.mark.parametrize(
    ("file", "spoil", "says"),
    [
        ("tokenizer.json", lambda path: path.unlink(), ["has no tokenizer.json"]),
        ("tokenizer.json", lambda path: path.write_text("{"), ["tokenizer.json is not a tokenizer (", "copy it again"]),
        ("tokenizer_config.json", lambda path: path.write_text("{"), ["tokenizer_config.json is not JSON"]),
        ("tokenizer_config.json", lambda path: path.write_text("3"), ["must hold an object, not a int"]),
        ("tokenizer_config.json", lambda path: changed(path, eos_token="<|im_end|>"), ["ends turns with '<|im_end|>'"]),
        (
            "generation_config.json",
            lambda path: path.write_text('{"eos_token_id": [0, 151645]}'),
            ["generation_config.json ends turns with 151645, and tokenizer.json has no such id"],
        ),
    ],
)
def test_a_tokenizer(train, model, file, spoil, says):
    spoil(model / file)
    assert_refused(train(f"model.path={model}"), *says)


def test_a_tokenizer_of_a_larger_model(train, model, tiny_tokenizer):
    """Its last tokens have no row in the embedding, which on a GPU would kill the process."""
    decoder = Decoder(DecoderConfig(tiny_tokenizer.vocab_size - 2, 32, 64, 2, 4, 2))
    save_model(decoder, model)
    size = tiny_tokenizer.vocab_size
    assert_refused(train(f"model.path={model}"), f"the tokenizer has {size} tokens and the model only {size - 2}")


# ----------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {num_stepz: 3}\n", ["unknown key `train.num_stepz`: did you mean `train.num_steps`?"]),
        ("trian: {num_steps: 3}\n", ["unknown key `trian`: did you mean `train`?"]),
        ("train: {num_steps: 3}\nrun: {seed: 1}\ntrain: {eval_every: 2}\n", ["own.yaml", "`train` stands twice", "3"]),
        ("train: {num_steps: 3, num_steps: 4}\n", ["`num_steps` stands twice"]),
        ("train:\n", ["`train`: must be a section of keys, not None"]),
        ("- train\n", ["own.yaml must hold sections"]),
        ("train: [\n", ["own.yaml is not valid YAML", "line 2"]),
        (b"\xff\xfe\x00", ["own.yaml is not valid YAML", "can't decode"]),
        ("model: {lora: {rank: 0, path: sft}}\n", ["model.lora.path: rank 0 means that there is no adapter"]),
        ("model: {lora: {rank: half}}\n", ["`model.lora.rank`"]),
        ("optimizer: {betas: [0.9, 1.0]}\n", ["`optimizer.betas.1`", "less than 1"]),
        ("train: {num_minibatches: 0}\n", ["`train.num_minibatches`", "greater than or equal to 1"]),
        ("algorithm: {group_size: 1}\n", ["algorithm.group_size: GRPO compares samples of one question"]),
    ],
)
def test_a_configuration(train, tmp_path, text, says):
    file = tmp_path / "own.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(train(file=file), *says)
    assert not (tmp_path / "runs").exists()


def test_rank_0_is_no_adapter(train):
    """Whatever the other settings of an adapter are, every weight is trained."""
    assert train("model.lora={rank: 0, alpha: 3, targets: [q_proj]}")[0] == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.questions_per_step=5", "train.num_minibatches=3", "algorithm.group_size=3"),  # nothing divides
        ("train.questions_per_step=2", "train.num_minibatches=7", "algorithm.drop_zero_variance_groups=false"),
        ("train.questions_per_step=9",),  # more than there are questions
        ("train.tokens_per_microbatch=1",),  # every trajectory is a micro-batch of its own
    ],
)
def test_sizes_that_do_not_divide_are_no_mistake(train, overrides):
    assert train(*overrides)[0] == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "questions.jsonl, line 3 is not valid JSON"),
        ("[1]", "questions.jsonl, line 3 must be an object, not a list"),
        ('{"id": "x", "question": "k1"}', "questions.jsonl, line 3: `golden_answers` must be a list of strings"),
        ('{"id": "x", "question": "k1", "golden_answers": [" "]}', "line 3: the question has no answer; give at least"),
        ('{"id": "x", "golden_answers": ["b"]}', "questions.jsonl, line 3: the key `question` is missing"),
    ],
)
def test_a_broken_line(train, make_config, line, says):
    file = Path(make_config().data.questions)
    good = file.read_text().splitlines()
    file.write_text("\n".join([*good[:2], line, *good[2:]]))
    assert_refused(train(), says)


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"num_hidden_layers": 1}, "it also holds 'policy.decoder.model.layers.1."),
        ({"num_hidden_layers": 3}, "it lacks 'policy.decoder.model.layers.2."),
        ({"intermediate_size": 96}, "mlp.gate_proj.weight is (64, 32), the model's is (96, 32)"),
    ],
)
def test_another_model(train, model, tmp_path, shape, says):
    assert train()[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    changed(model / "config.json", **shape)
    save_model(Decoder(DecoderConfig.from_hf(json.loads((model / "config.json").read_text()))), model)
    overrides = (f"model.path={model}", "run.resume=true", "train.num_steps=2")
    assert_refused(train(*overrides), "step_000001", says, "resume with the model")
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}


@pytest.mark.parametrize("latest", ["gone", "a file"])
def test_a_run_whose_link_was_lost_goes_on_all_the_same(train, tmp_path, latest):
    """Tools that know no links make such copies. Starting over would delete the run's metrics."""
    assert train("train.num_steps=2", "checkpoint.every=1")[0] == 0
    link = tmp_path / "runs" / "tiny" / "checkpoints" / "latest"
    newest = link.with_name(os.readlink(link))
    link.unlink()
    if latest == "a file":
        link.write_text(newest.name)
    assert train("train.num_steps=3", "run.resume=true")[0] == 0
    rows = (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    assert os.readlink(link) == "step_000003"
    link.unlink()
    shutil.copytree(newest, link)
    assert_refused(train("train.num_steps=4", "run.resume=true"), "latest is a folder, where a link", "delete it")
