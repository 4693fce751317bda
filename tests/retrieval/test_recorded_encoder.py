"""An encoder's recorded passes: vectors equal those of the unrecorded pass, and depend on their text alone.

All of it runs on a CPU, where a pass is replayed by running it; with `cuda` a recording is a graph, where there is a
GPU.
"""

from __future__ import annotations

import importlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes
from test_encoders import GIVEN, make_model, texts

from searchr1_fast.retrieval import memory_plan, parking
from searchr1_fast.retrieval.encoder_bert import _SMALL_TILE, _TOKENS_AT_ONCE, BertEncoder, BertSettings
from searchr1_fast.retrieval.parking import ParkedMemory
from searchr1_fast.retrieval.protocol import Parks
from searchr1_fast.retrieval.recorded_encoder import PackedTexts, RecordedForward, fill, num_numbers, num_places

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
BERT = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}


def recorded_encoder(folder, device="cpu", given=GIVEN) -> BertEncoder:
    """-> an encoder; on a CPU its recordings have the class from which a GPU's derive."""
    encoder = BertEncoder(folder, given, device)
    if device == "cpu":
        forward = partial(encoder._model.pooled_packed, pooling=given.pooling)
        encoder._recorded = RecordedForward(forward, torch.device("cpu"), 32, 1024)
        encoder._recorded.record()
    return encoder


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=8), spare_rows=st.integers(1, 20))
def test_every_row_knows_its_text_and_the_rest_is_one_text_that_nobody_asked_for(lengths, spare_rows):
    num_rows = sum(lengths) + 4 * len(lengths) + 4 * spare_rows
    ids = [[1000 * text + place for place in range(length)] for text, length in enumerate(lengths)]
    memory = torch.full((num_numbers(num_rows) + 3,), -7, dtype=torch.int64)
    packed = PackedTexts.views(memory, num_rows)
    fill(packed, ids)
    begin = 0
    for text, length in enumerate(lengths):
        rows = slice(begin, begin + length)
        assert packed.token_ids[rows].tolist() == ids[text]
        assert packed.positions[rows].tolist() == list(range(length))
        assert set(packed.firsts[rows].tolist()) == {begin} and set(packed.lasts[rows].tolist()) == {length - 1}
        assert (packed.text_firsts[text], packed.text_lasts[text]) == (begin, length - 1)
        begin += length
    spare = num_rows - 1
    assert set(packed.text_firsts[len(lengths) :].tolist()) <= {spare}
    assert set(packed.text_lasts[len(lengths) :].tolist()) <= {0}
    assert (packed.firsts[spare], packed.lasts[spare]) == (spare, 0)
    tiled = [list(range(first, first + count)) for first, count in packed.tiles.tolist() if first != spare]
    assert [row for tile in tiled for row in tile] == list(range(begin))
    assert all(len({int(packed.firsts[row]) for row in tile}) == 1 and len(tile) <= 64 for tile in tiled)
    assert (memory[-3:] == -7).all() and len(packed.tiles) == num_places(num_rows)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(
    ("family", "pooling", "changes"),
    [("bert", "mean", BERT), ("bert", "cls", {}), ("roberta", "mean", {"type_vocab_size": 1})],
)
def test_recorded_vectors_are_those_of_the_other_pass(tmp_path, family, pooling, changes, device):
    """For any size: one text, and more than the largest size takes."""
    make_model(tmp_path, family, **changes)
    given = BertSettings(pooling, True, 32, "query: ", "passage: ")
    encoder, plain = recorded_encoder(tmp_path, device, given), BertEncoder(tmp_path, given)
    assert plain._recorded is None and len(encoder._recorded) == len(encoder._recorded.sizes)
    contents = texts(200)
    for part in (contents, contents[:1], [""], contents[5:9]):
        np.testing.assert_allclose(encoder.encode_passages(part), plain.encode_passages(part), atol=2e-5)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_recorded_vector_depends_on_its_text_alone(tmp_path, pooling, device):
    """Bit for bit: alone, among 256, in another order, recorded or launched, and after anything else."""
    make_model(tmp_path, **BERT)
    encoder = recorded_encoder(tmp_path, device, BertSettings(pooling, True, 32, "", ""))
    contents = texts(256, longest=40)
    together = encoder.encode_passages(contents)
    alone = np.concatenate([encoder.encode_passages([text]) for text in contents])
    assert (alone == together).all()
    for size in (2, 7, 100):
        assert (encoder.encode_passages(contents[:size]) == together[:size]).all()
    order = np.random.default_rng(1).permutation(256)
    assert (encoder.encode_passages([contents[place] for place in order]) == together[order]).all()
    encoder._recorded.enabled = False
    assert (encoder.encode_passages(contents[:100]) == together[:100]).all()
    assert (encoder.encode_passages(contents[:1]) == together[:1]).all()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("changes", [BERT, {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}])
def test_a_pass_takes_what_the_plan_says(tmp_path, monkeypatch, pooling, changes):
    """Weights to the byte, and the peak of live memory to a few per cent."""
    sizes = RecordedForward(lambda texts: None, torch.device("cpu"), _SMALL_TILE["cuda"], _TOKENS_AT_ONCE).sizes
    assert sizes[-1] == memory_plan.RECORDED_ROWS
    monkeypatch.setattr(memory_plan, "RECORDED_ROWS", 1024)
    make_model(tmp_path, **changes)
    model = BertEncoder(tmp_path, BertSettings(pooling, True, 32, "", ""))._model
    weights, work = memory_plan.encoder_bytes(json.loads((tmp_path / "config.json").read_text()))
    pairs = [pair for layer in model._layers for pair in (*layer.products, layer.norm, layer.last_norm)]
    pairs += [(model._words, model._positions), model._embedding_norm]
    assert weights == sum(tensor.nbytes for pair in pairs for tensor in pair)
    packed = PackedTexts.views(torch.zeros(num_numbers(1024), dtype=torch.int64), 1024)
    fill(packed, [[5] * 9] * 3)
    attention = importlib.import_module("searchr1_kernels.cached_attention")
    monkeypatch.setattr(attention, "_OPERATOR", attention._cached_attention)
    with LiveBytes() as counted:
        model.pooled_packed(packed, pooling)
    assert work == pytest.approx(counted.peak, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_an_encoder_that_was_parked_makes_the_same_bits(tmp_path, device):
    make_model(tmp_path, **BERT)
    encoder = recorded_encoder(tmp_path, device)
    contents = texts(60)
    wanted, num_sizes = encoder.encode_passages(contents), len(encoder._recorded)
    assert isinstance(encoder, Parks) and not encoder.is_parked
    if device == "cpu":
        encoder.park()
        assert not encoder.is_parked  # a CPU has no memory to give back, except through the twin of a GPU's
        encoder._memory = ParkedMemory(encoder._model.tensors, [], torch.device("cpu"))
    for _ in range(2):
        encoder.park()
        encoder.park()
        assert encoder.is_parked and len(encoder._recorded) == 0
        for tensor in encoder._model.tensors:
            gone = tensor.untyped_storage().nbytes() == 0 if device == "cuda" else bool(tensor.isnan().all())
            assert gone
        encoder.unpark()
        encoder.unpark()
        assert not encoder.is_parked and len(encoder._recorded) == num_sizes
        assert (encoder.encode_passages(contents) == wanted).all()
        assert (encoder.encode_passages(contents[:1]) == wanted[:1]).all()


def test_an_encoder_that_could_not_be_parked_is_as_it_was(tmp_path, monkeypatch):
    make_model(tmp_path, **BERT)
    encoder = recorded_encoder(tmp_path)
    wanted, num_sizes = encoder.encode_passages(texts(9)), len(encoder._recorded)
    encoder._memory = ParkedMemory(encoder._model.tensors, [], torch.device("cpu"))

    def refuse(num_bytes, device, setting):
        raise ValueError(f"{setting}: {num_bytes} bytes could not be page-locked")

    monkeypatch.setattr(parking, "host_memory", refuse)
    with pytest.raises(ValueError, match="could not be page-locked"):
        encoder.park()
    assert not encoder.is_parked and len(encoder._recorded) == num_sizes
    assert (encoder.encode_passages(texts(9)) == wanted).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_an_encoder_s_memory_back(tmp_path):
    """It has that of the weights and of the recorded passes; on a search's stream, beside the default one."""
    make_model(tmp_path, hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=6)
    encoder = BertEncoder(tmp_path, GIVEN, "cuda")
    stream, contents = torch.cuda.Stream(), texts(256)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = encoder.encode_passages(contents)
        weights = sum(tensor.nbytes for tensor in encoder._model.tensors)
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()  # of this process: the driver's free memory depends on others too
            encoder.park()
            assert before - torch.cuda.memory_reserved() >= weights
            others = torch.full((weights,), 7, dtype=torch.uint8, device="cuda")  # perhaps where the weights were
            encoder.unpark()
            assert (encoder.encode_passages(contents) == wanted).all()
            assert bool((others == 7).all())


def test_a_batch_takes_the_next_size_that_has_room():
    """Room for its tokens and one more row, and for its texts."""
    sizes = []

    def forward(packed):
        sizes.append(len(packed.token_ids))
        return packed.token_ids[packed.text_firsts].float()[:, None]

    recorded = RecordedForward(forward, torch.device("cpu"), 32, 1024)
    assert recorded.sizes == (*(32 * many for many in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)), 1056)
    for lengths, size in (([31], 32), ([32], 64), ([1] * 8, 32), ([1] * 9, 64), ([65], 96), ([1024], 1056)):
        found = recorded.pooled([[number] * length for number, length in enumerate(lengths)])
        assert (found[:, 0].tolist(), sizes.pop()) == (list(range(len(lengths))), size)
    found = recorded.pooled([[number] * 100 for number in range(25)])  # more than the largest size takes
    assert (found[:, 0].tolist(), sizes) == (list(range(25)), [1024, 1024, 512])
    sizes.clear()
    found = recorded.pooled([[number] for number in range(600)])
    assert (found[:, 0].tolist(), sizes) == (list(range(600)), [1056, 1056, 384])


def test_what_a_pass_launches_does_not_depend_on_its_texts(tmp_path):
    """A recording is a fixed list of launches. Groups of equal length take more, and others for every batch."""
    make_model(tmp_path, **BERT)
    encoder = recorded_encoder(tmp_path)
    sizes = encoder._recorded.sizes

    def packed_operations(lengths):
        with Operations() as counted:
            encoder._recorded._encode([[5] * length for length in lengths])
        return counted.names

    def grouped_operations(lengths):
        with Operations() as counted:
            encoder._model.pooled([[5] * length for length in sorted(lengths)], "mean")
        return counted.names

    one, other = [9] * 10, [3, 4, 5, 6, 8, 9, 10, 12, 14, 15]
    assert len({next(size for size in sizes if sum(lengths) < size) for lengths in (one, other)}) == 1
    assert packed_operations(one) == packed_operations(other)
    assert len(grouped_operations(other)) > len(grouped_operations(one)) > 0
    assert sum(name == "cached_attention" for name in packed_operations(other)) == 2 + 1  # the layers, and the mean
    assert sum("scaled_dot_product" in name for name in grouped_operations(other)) == 2 * len(set(other))


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the names of operations that torch is asked for, except views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, kinds, arguments=(), keywords=None):
        if not function.is_view:
            self.names.append(function._schema.name.partition("::")[2])
        return function(*arguments, **(keywords or {}))
