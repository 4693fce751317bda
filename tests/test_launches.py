"""What a GPU would be asked to do at published shapes, without one: all of the host's code for it runs, on tensors that
have shapes and say that they are on a GPU, and no kernel does. So nothing may ask for a value, which on a GPU waits,
and every launch fits its kernel and CUDA's limits. What Triton would compile for it then is compiled, for Hopper: that
spills nothing and fits. Kernels that are compiled again for another number of rows would be so in the middle of a step,
and may round otherwise."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gpu_operators import OPERATORS
from searchr1_kernels import Hits, PolicyLoss
from searchr1_kernels._objective_operator import arguments
from searchr1_kernels.policy_objective import PolicyRows
from torch.overrides import TorchFunctionMode

from searchr1_fast.models import Decoder, KVCache, rope
from searchr1_fast.models.attention_backends import choose_attention
from searchr1_fast.models.lora import add_adapter
from searchr1_fast.models.published import published_config
from searchr1_fast.packing import pack
from searchr1_fast.policy import to_device
from searchr1_fast.rollout.decode_graph import _decode_step
from searchr1_fast.rollout.sampling import SamplingParams, head_logits, sample

jit = pytest.importorskip("triton.runtime.jit", reason="needs Triton")
launch_forms, compile_report = (importlib.import_module(name) for name in ("launch_forms", "compile_report"))
LiveBytes = importlib.import_module("live_bytes").LiveBytes
_topk_passes = importlib.import_module("searchr1_kernels._topk_passes")
_gae_triton = importlib.import_module("searchr1_kernels._gae_triton")

GPU, META = torch.device("cuda", 0), torch.device("meta")
H200 = SimpleNamespace(shared_memory_per_block_optin=232_448, multi_processor_count=132, major=9, minor=0)
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYER = ["normalise", "rotate_and_write", "attend", "combine", "normalise", "multiply"]


class SayGpu(TorchFunctionMode):
    """Tensors without values, which would be on the meta device, say that they are on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return GPU if function(*args).type == "meta" else function(*args)
        if function == torch.Tensor.is_cuda.__get__:
            return args[0].is_meta
        if function is torch.Tensor.get_device:
            return 0 if args[0].is_meta else -1
        if function is torch.Tensor.data_ptr and args[0].is_meta:  # as an allocator gives it, in whole 512 bytes
            return (1 + args[0].untyped_storage()._cdata % 2**20) * 2**40 + args[0].storage_offset() * args[0].itemsize
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            assert function not in (torch.tensor, torch.as_tensor), "a copy from memory that is not pinned waits"
            kwargs["device"] = META
        if function in (torch.repeat_interleave, torch.Tensor.repeat_interleave):
            assert isinstance(args[1], int) or "output_size" in kwargs, "the device would be asked for a length"
        if function is torch.addmm and "out_dtype" in kwargs:  # for which torch 2.11 takes a type for a factor here
            assert kwargs["out"].shape == (args[1].shape[0], args[2].shape[1]) and args[0] is kwargs["out"]
            return kwargs["out"]
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.to and GPU in args:
            assert args[0].is_meta or kwargs.get("non_blocking"), "a copy to the device waits"
            args = tuple(META if isinstance(x, torch.device) and x == GPU else x for x in args)
        return function(*args, **kwargs)


class Launches(list):
    """Names of the kernels that were launched, in order, and by key all that Triton would have compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: dict[tuple, launch_forms.Form] = {}
        self._new: set[tuple] = set()

    def add(self, form: launch_forms.Form) -> None:
        self.append(form.kernel.__name__)
        self.forms[form.key] = form
        self._new.add(form.key)

    def take_keys(self) -> set[tuple]:
        """Of what was launched since the last call."""
        keys, self._new = self._new, set()
        return keys


_compiled: set[tuple] = set()  # without a fault


@pytest.fixture
def launches(monkeypatch):
    """What was launched while the test ran; all of it is compiled at the end."""
    found = Launches()

    def record(kernel, *given, grid, warmup=False, **named):
        parameters = {parameter.name: parameter for parameter in kernel.params}
        values = dict(zip(kernel.arg_names, given, strict=False)) | named
        missing = parameters.keys() - values.keys()
        assert not missing, f"{kernel.__name__} is not given {missing}"
        unknown = values.keys() - parameters.keys() - {"num_warps", "num_stages", "launch_pdl"}
        assert not unknown, f"{kernel.__name__} does not know {unknown}"
        for name, value in values.items():
            constant = isinstance(value, bool | int | float)
            assert constant or (name in parameters and not parameters[name].is_constexpr), f"{kernel.__name__}: {name}"
            if type(value).__name__ == "TensorDescriptor":
                assert max(value.block_shape) <= 256 and value.block_shape[-1] * value.base.itemsize <= 512
            elif isinstance(value, torch.Tensor):
                assert value.is_meta, f"{kernel.__name__}: {name} is in the host's memory"
        for programs, most in zip(grid, MOST_PROGRAMS, strict=False):
            assert 0 < programs <= most, f"{kernel.__name__}: {grid}"
        found.add(launch_forms.form_of(kernel, given, named))

    monkeypatch.setattr(jit.JITFunction, "run", record)
    for module, names in OPERATORS.items():
        module = importlib.import_module(f"searchr1_kernels.{module}")
        for name, implementation in names.items():
            monkeypatch.setattr(module, name, getattr(module, implementation))
    for name, value in {
        "device_of": lambda tensor: contextlib.nullcontext(),
        "get_device_properties": lambda device: H200,
        "get_device_capability": lambda device: (9, 0),
        "mem_get_info": lambda device: (130 << 30, 141 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    forget()
    with SayGpu(), torch.no_grad():
        yield found
    forget()
    new = [form for key, form in found.forms.items() if key not in _compiled]
    faults = [fault for form in new for fault in form.faults()]
    assert not faults, "\n".join(faults)
    _compiled.update(found.forms)


def forget() -> None:
    """What is remembered of a device, which is not this one's."""
    for remembered in (rope._frequencies, choose_attention, _topk_passes._device, _gae_triton._can_overlap):
        remembered.cache_clear()


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def places(count: int) -> torch.Tensor:
    return tensor(count, dtype=torch.int64)


def build(name: str, dtype: torch.dtype, lora_rank: int = 0) -> tuple[Decoder, KVCache]:
    """Two layers of a published shape, and a cache of 256 sequences."""
    config = replace(published_config(name), num_hidden_layers=2)
    with META:
        model = Decoder(config).to(dtype)
    if lora_rank:
        add_adapter(model, lora_rank, 32.0, ADAPTED, dtype)
    model.requires_grad_(False).join_projections()
    return model, KVCache(config, 257, 4096, dtype, META, num_blocks=9000)


@pytest.mark.parametrize("lora_rank", [0, 16])
@pytest.mark.parametrize("name", ["qwen2.5-3b", "qwen2.5-7b", "llama-3.2-3b", "qwen3-4b"])
def test_a_decode_step(launches, name, lora_rank):
    model, cache = build(name, torch.bfloat16, lora_rank)
    for rows in (256, 5, 1):
        inputs = [*(places(rows) for _ in range(4)), tensor(rows, dtype=torch.float64)]
        outputs = tensor(2 * rows, dtype=torch.int32)
        for params, drawn in (
            (SamplingParams(), ["summarise", "draw"]),
            (SamplingParams(0.8, top_p=0.9, top_k=20), ["summarise", "bound", "collect", "choose"]),
        ):
            launches.clear()
            _decode_step(model, cache, places(257), inputs, outputs, params)()
            assert launches == [*LAYER, *LAYER, "normalise", *drawn]


def test_a_step_in_which_sequences_join(launches):
    """Lone tokens in parts, the others in tiles; the last layer goes on with the last token of each alone."""
    model, cache = build("qwen2.5-3b", torch.bfloat16)
    lengths = np.array([700, 1, 1, 90, 1])
    cache.set_table(places(3), places(3), places(3))
    cache.copy(places(3), places(3), places(3))
    hidden = model.forward_cached(places(lengths.sum()), places(6), places(5), places(5), cache, lengths)
    assert hidden.shape == (5, model.config.hidden_size)
    layer = [*LAYER[:4], "attend", *LAYER[4:]]
    assert launches == [*layer, *layer, "normalise"]
    sample(head_logits(hidden, model.head_weight), tensor(5, dtype=torch.float64), SamplingParams())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("lora_rank", [0, 16])
def test_an_update_up_to_the_head(launches, make_trajectory, lora_rank, checkpointing):
    """Forward and backward, of sequences that begin alike: no launch of ours, and no wait."""
    trajectories = [make_trajectory(seed, [(False, 30), (True, 9 + seed), (False, 70)]) for seed in range(4)]
    for trajectory in trajectories[1:]:
        trajectory.token_ids[:35] = trajectories[0].token_ids[:35]
    (batch,) = pack(trajectories, [1.0] * 4, 1000)
    batch = to_device(batch, GPU)
    assert batch.prefixes.key_index.is_cuda and batch.token_ids.is_cuda
    config = replace(published_config("qwen2.5-3b"), num_hidden_layers=2)
    with META:
        model = Decoder(config).to(torch.bfloat16)
    if lora_rank:
        add_adapter(model, lora_rank, 32.0, ADAPTED, torch.bfloat16)
    model.checkpoint_blocks(checkpointing)
    with torch.enable_grad():
        hidden = model.scored_hidden(batch)
        hidden.float().sum().backward()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert hidden.shape[0] == len(batch.scored_rows) and not launches
    assert len(learned) == (2 * 2 * len(ADAPTED) if lora_rank else len(list(model.parameters())))
    assert all((p.grad is None) == (p is model.lm_head.weight and not config.tie_word_embeddings) for p in learned)


@pytest.mark.parametrize(
    ("rows", "size", "vocabulary"), [(16_384, 2048, 151_936), (8192, 3584, 152_064), (1, 896, 151_936)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_head(launches, dtype, rows, size, vocabulary):
    """Scores, with and without what a backward pass wants, and both ways to gradients."""
    logprob, policy = (
        importlib.import_module(f"searchr1_kernels.linear_{name}") for name in ("logprob", "policy_loss")
    )
    sides = tensor(rows, size, dtype=dtype), tensor(vocabulary, size, dtype=dtype), places(rows)
    logprob._forward(*sides, 1.0, None, True, False)
    without_logits = ["scan_vocabulary", "target_logits", "merge_spans"]
    assert (launches == without_logits) == (dtype != torch.float32)
    *scores, saved = logprob._forward(*sides, 0.7, None, True, True)
    for by_entropy in (None, tensor(rows)):
        launches.clear()
        gradients = logprob._backward(tensor(rows), by_entropy, *sides, scores[1], saved, 0.7, None, True, True)
        assert [(g.shape, g.dtype) for g in gradients] == [(side.shape, dtype) for side in sides[:2]]
        own = "differentiate_products" if dtype == torch.bfloat16 else "differentiate_rows"
        assert set(launches) == {own}
    for coefficient in (0.0, 0.01):
        launches.clear()
        loss = PolicyLoss(entropy_coefficient=coefficient)
        aims = arguments(PolicyRows(tensor(rows), tensor(rows), None, None, None), None, None, loss, False)
        denominator = torch.ones((), dtype=torch.float64)
        value, metrics, *gradients = policy._forward(*sides, *aims, denominator, 1.0, None, True, True, True)
        assert value.shape == () and [g.shape for g in gradients] == [side.shape for side in sides[:2]]
        assert ("keep_probabilities" in launches) == (dtype == torch.bfloat16)
        assert ("scale_each" in launches) == (dtype == torch.bfloat16 and not coefficient)


@pytest.mark.parametrize(
    ("rows", "function", "account"),
    [
        (16_384, "linear_logprob", 1.294e9),
        (16_384, "linear_policy_loss", 1.343e9),
        (4915, "linear_policy_loss", 1.176e9),
        (17_664, "linear_policy_loss", 1.435e9),
        (35_328, "linear_policy_loss", 2.2e9),
        (65_536, "linear_policy_loss", 2.9e9),
    ],
)
def test_the_head_s_memory(launches, rows, function, account):
    """What is alive at the highest, both gradients included, to 2 %. On an H200, where the library keeps memory too, it
    was 1.36 GB for 16k rows by `linear_logprob`."""
    logprob, policy = (
        importlib.import_module(f"searchr1_kernels.linear_{name}") for name in ("logprob", "policy_loss")
    )
    size, vocabulary = 2048, 151_936
    sides = tensor(rows, size, dtype=torch.bfloat16), tensor(vocabulary, size, dtype=torch.bfloat16), places(rows)
    known = PolicyRows(tensor(rows), tensor(rows), None, None, None)
    aims = arguments(known, None, None, PolicyLoss(kind="reinforce"), False)
    slopes = tensor(rows)
    with LiveBytes() as live:
        if function == "linear_logprob":
            *_, saved = logprob._forward(*sides, 1.0, None, False, True)
            logprob._backward(slopes, None, *sides, None, saved, 1.0, None, True, True)
        else:
            policy._forward(*sides, *aims, torch.ones((), dtype=torch.float64), 1.0, None, True, True, True)
    assert live.peak == pytest.approx(account, rel=0.02)
    assert live.peak <= 1.5e9 or rows > 17_664


@pytest.mark.parametrize("coarse", ["float", "int8"])
@pytest.mark.parametrize("rows", [8_000_000, 21_015_324])
def test_a_search(launches, rows, coarse):
    """Nine launches for every number of queries and hits, by every way to read the rows."""
    size, num_blocks = 768, -(-rows // 128)
    parts = [tensor(num_blocks)]
    if coarse == "int8":
        parts += [tensor(size), tensor(rows, size, dtype=torch.int8), tensor(rows), tensor(rows), tensor(num_blocks)]
    searches = _topk_passes.Passes(_topk_passes.Corpus(tensor(rows, size, dtype=torch.float16), None, parts), 512, 192)
    memory, queries = tensor(Hits.nbytes(512, 192), dtype=torch.uint8), tensor(512, size)
    for count in (1, 16, 48, 128, 256, 512):
        for k in (1, 16, 100):
            launches.clear()
            searches.launch(queries[:count], k, Hits.views(memory, count, k))
            assert [name for name in launches if not name.endswith("_bounds")] == [
                "prepare_queries", "group_maxima", *["best_blocks", "exact_keys", "best_hits"] * 2,
            ]  # fmt: skip
            assert len(launches) == 9
        ways = _topk_passes._candidates(*searches._kind(count))
        assert len(ways) > 1
        for way in ways:
            searches.bounds(queries[:count], way)


# -------------------------------------------------------------------------------- one kernel for every number of rows


def one_set_of_kernels(launches: Launches, run, counts: tuple[int, ...]) -> None:
    """`run` of each of the counts."""
    sets = []
    for count in counts:
        launches.take_keys()
        run(count)
        sets.append(launches.take_keys())
    for count, keys in zip(counts, sets, strict=True):
        differing = "\n".join(str(launches.forms[key]) for key in keys ^ sets[0])
        assert not differing, f"{count} and {counts[0]} rows do not have the same kernels:\n{differing}"


@pytest.mark.parametrize(("softcap", "counts"), [(None, (4915, 1, 16_384, 40_001)), (30.0, (40_001, 44_001))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_head_of_any_number_of_rows(launches, dtype, softcap, counts):
    """One chunk and several. Under a softcap of as many rows as have slabs of one width, which is a constant there."""
    logprob, policy = (
        importlib.import_module(f"searchr1_kernels.linear_{name}") for name in ("logprob", "policy_loss")
    )
    weight = tensor(151_936, 2048, dtype=dtype)

    def run(rows: int) -> None:
        sides = tensor(rows, 2048, dtype=dtype), weight, places(rows)
        logprob._forward(*sides, 1.0, softcap, True, False)
        *scores, saved = logprob._forward(*sides, 0.7, softcap, True, True)
        for by_entropy in (None, tensor(rows)):
            logprob._backward(tensor(rows), by_entropy, *sides, scores[1], saved, 0.7, softcap, True, True)
        rows_ = PolicyRows(tensor(rows), tensor(rows), None, None, None)
        aims = arguments(rows_, None, None, PolicyLoss(), False)
        denominator = torch.ones((), dtype=torch.float64)
        policy._forward(*sides, *aims, denominator, 1.0, softcap, True, True, True)

    one_set_of_kernels(launches, run, counts)


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-3b"])
def test_steps_of_any_number_of_sequences(launches, name):
    """As the engine sends their numbers: arrays of 8 bytes each, end to end, so that every other begins at a multiple
    of 16. 14 heads are no whole 16 bytes of fp32."""
    model, cache = build(name, torch.bfloat16)
    params = SamplingParams(0.8, top_p=0.9)

    def decode(rows: int) -> None:
        *inputs, uniforms = places(5 * rows).split(rows)
        outputs = tensor(2 * rows, dtype=torch.int32)
        _decode_step(model, cache, places(257), [*inputs, uniforms.view(torch.float64)], outputs, params)()
        sample(tensor(rows, 151_936), uniforms.view(torch.float64), SamplingParams())

    def join(rows: int) -> None:
        lengths = np.array([70, *[1] * rows])
        _, slots, starts = places(2 * rows + 3).split([1, rows + 1, rows + 1])
        model.forward_cached(places(lengths.sum()), places(rows + 2), slots, starts, cache, lengths)

    one_set_of_kernels(launches, decode, (64, 2, 1))
    one_set_of_kernels(launches, join, (64, 2, 1))


@pytest.mark.parametrize("ways", [{}, {"OVERLAP": True}])
def test_the_scan_and_what_scales_of_any_number(launches, monkeypatch, ways):
    scan, scaling = _gae_triton, importlib.import_module("searchr1_kernels._scaling_triton")
    monkeypatch.setattr(scan, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    monkeypatch.setattr(scan, "LAUNCH_DIRECTLY", False)
    for name, value in ways.items():
        monkeypatch.setattr(scan, name, value)

    def run(tokens: int) -> None:
        for sequences in (1 + tokens // 244, 1):  # a tile each, and many
            vectors = tensor(tokens), tensor(tokens)
            for mask in (None, tensor(tokens, dtype=torch.bool)):
                for offsets in (torch.int32, torch.int64):
                    ends = tensor(sequences + 1, dtype=offsets)
                    scan.scan(*vectors, ends, 0.99, 0.94, mask, tensor(2, tokens))

    one_set_of_kernels(launches, run, (1_000_000, 20_001))
    assert set(launches) == {"scan_sequences", "scan_tiles", "apply_carries"}
    for shape in ((151_936, 2048), (152_064, 18_000), (5,)):  # more than 31 bits count, and few
        for dtype in (torch.bfloat16, torch.float32):
            scaling.scale(tensor(*shape, dtype=dtype), tensor())


def test_a_launch_that_begins_early_waits_for_what_it_reads():
    """In the code of both kernels: the maps are read behind the wait, and a program without a tile waits too."""
    for name, kernel, types, constants, *numbers, _ in _gae_triton.compile_cases()[1:]:
        constants = constants | {"OVERLAPS": True}
        signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
        code = compile_report.compiled(kernel, signature, constants, {}, *numbers, 90).asm["ptx"]
        read, begins = code.find("ld.global.b64"), code.find("griddepcontrol.launch_dependents")
        if name == "gae_scan_tiles":
            assert 0 <= begins < code.find("ld.global") and "griddepcontrol.wait" not in code
        else:
            assert 0 <= code.find("griddepcontrol.wait") < read and code.count("griddepcontrol.wait") == 2 > begins


@pytest.mark.parametrize("vocabulary", [151_936, 128_256, 50_257, 32_001, 500])
def test_sampling_of_any_number_of_rows(launches, vocabulary):
    def run(rows: int) -> None:
        for options in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20}, {"top_p": 0.9, "top_k": 20}):
            sample(tensor(rows, vocabulary), tensor(rows, dtype=torch.float64), SamplingParams(**options))

    one_set_of_kernels(launches, run, (256, 3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "size"), [(12, 64), (12, 32)])
def test_an_encoder_of_any_number_of_texts(launches, heads, size, dtype):
    """As `encoder_bert` reads its packed texts: keys are rows from each row on."""
    attention = importlib.import_module("searchr1_kernels.cached_attention")
    width, longest = heads * size, 512

    def run(rows: int) -> None:
        packed = tensor(rows + longest - 1, 3 * width, dtype=dtype)
        stride = packed.stride(0)
        keys, values = (
            packed.as_strided((rows, heads, longest, size), (stride, size, stride, 1), offset)
            for offset in (width, 2 * width)
        )
        query = packed[:rows, :width].view(rows, heads, size)
        tiles = tensor(rows // 4, 2, dtype=torch.int32)
        attention.cached_attention(query, keys, values, places(rows), places(rows), tiles=tiles)

    one_set_of_kernels(launches, run, (4096, 64))


@pytest.mark.parametrize("coarse", ["float", "int8"])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(400, torch.float16), (768, torch.float32), (768, torch.int8)]
    + [(size, dtype) for size in (200, 75) for dtype in (torch.float16, torch.float32, torch.int8)],
)
def test_a_search_of_other_rows(launches, size, dtype, coarse):
    """400 numbers fill no whole number of steps, 200 are read by descriptors alone in vectors, 75 by nothing; 8-bit
    rows have their scales."""
    rows, num_blocks = 200_000, 1563
    memory, queries = tensor(Hits.nbytes(512, 100), dtype=torch.uint8), tensor(512, size)
    scales = tensor(rows) if dtype == torch.int8 else None
    parts = [tensor(num_blocks)]
    if coarse == "int8":
        parts += [tensor(size), tensor(rows, size, dtype=torch.int8), tensor(rows), tensor(rows), tensor(num_blocks)]
    corpus = _topk_passes.Corpus(tensor(rows, size, dtype=dtype), scales, parts)
    searches = _topk_passes.Passes(corpus, 512, 100)
    for count in (1, 128, 512):
        searches.launch(queries[:count], 16, Hits.views(memory, count, 16))
        for way in _topk_passes._candidates(*searches._kind(count)):
            searches.bounds(queries[:count], way)


def test_a_search_of_rows_anywhere_in_memory_and_of_many_queries(launches):
    """Where rows of whole 16 numbers begin would choose the order in which exact scores are summed."""
    memory = tensor(20_000 * 64 + 8, dtype=torch.float16)

    def run(first: int) -> None:
        rows = memory[first : first + 20_000 * 64].view(20_000, 64)
        searches = _topk_passes.Passes(_topk_passes.Corpus(rows, None, [tensor(157)]), 70_000, 1)
        for count in (1, 70_000):
            searches.launch(tensor(count, 64), 1, Hits.views(tensor(1 << 21, dtype=torch.uint8), count, 1))

    one_set_of_kernels(launches, run, (0, 1, 8))
