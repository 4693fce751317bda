"""The memory planner's activations, against what blocks really keep."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from searchr1_fast.config import LoraConfig, LoraTarget, load_config
from searchr1_fast.memory_plan import Batch, block_kept, plan_training
from searchr1_fast.models import Decoder, DecoderConfig
from searchr1_fast.models import decoder as decoder_module
from searchr1_fast.models.attention_backends import AttentionBackend
from searchr1_fast.models.lora import add_adapter
from searchr1_fast.models.published import published_config


class StandIn(torch.autograd.Function):
    """Keeps what an attention kernel keeps: its arguments, its output and a number per row and head."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError


TARGETS = (None, get_args(LoraTarget), ("v_proj", "gate_proj"), ("o_proj",), ("down_proj", "k_proj"))


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_block_keeps_what_is_planned(monkeypatch, mode, model_type, targets):
    """The difference of one layer on the meta device in bf16, with and without an adapter.

    Off CUDA a norm is not fused, and also keeps the normed row for the gradient of its weight.
    """
    lora = LoraConfig() if targets is None else LoraConfig(rank=24, targets=targets)
    backend = AttentionBackend("stand-in", "", lambda query, key, value, layout: StandIn.apply(query, key, value))
    monkeypatch.setattr(decoder_module, "choose_attention", lambda *_: backend)
    rows, kept = 4096, []
    shape = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 320, "model_type": model_type}
    for num_layers in (2, 3):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": num_layers}
        config = DecoderConfig(**shape, **heads, head_dim=32)
        with torch.device("meta"):
            decoder = Decoder(config).to(torch.bfloat16)
            if lora.rank:
                add_adapter(decoder, lora.rank, lora.alpha, lora.targets, torch.bfloat16)
        decoder.checkpoint_blocks(mode)
        kept.append(saved_bytes(decoder, rows))
    planned, _ = block_kept(config, 2, mode, lora=lora)
    if mode == "none" and not lora.rank:
        planned += 2 * 4 * config.hidden_size
        if model_type == "qwen3":
            planned += 4 * 32 * (4 + 2)
    parameters_in_fp32 = 8192  # weights of the norms, whatever the number of rows
    assert kept[1] - kept[0] == pytest.approx(rows * planned, abs=parameters_in_fp32)


def saved_bytes(decoder: Decoder, rows: int) -> int:
    own = {parameter.untyped_storage()._cdata for parameter in decoder.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    token_ids = torch.zeros(rows, dtype=torch.int64, device="meta")
    ends = torch.tensor([0, rows], dtype=torch.int32, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = decoder.hidden(token_ids, ends, max_seqlen=rows)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_less_scored_or_more_shared_is_other_memory():
    config = load_config("configs/search_r1_3b_grpo.yaml")
    decoder = published_config("qwen2.5-3b")

    def activations(batch):
        plan = plan_training(config, decoder, batch=batch)
        return next(row.num_bytes for row in plan.rows if row.name == "activations")

    whole = activations(Batch(8192, 8192, 8192))
    inner = 2 * (4 * 2048 + 4 + 2 * 2048) + 4 * 2 * 11008  # a block after its attention, and the last norm
    assert whole - activations(Batch(8192, 8192, 3000)) == 5192 * inner
    assert activations(Batch(8192, 12000, 8192)) - whole == 36 * (12000 - 8192) * 2 * 2 * 256
