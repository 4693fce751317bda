"""PPO's critic: a decoder with a scalar head.

It sees what the policy sees and values only the states in which the policy is about to write: the rows that predict
policy tokens. Retrieved tokens are neither valued nor trained on (the original does both). The head starts at zero, so
the first values are zero and the first advantages are plain returns.

Shape legend
    P  policy tokens of a micro-batch    R  of them those that are scored    S  its sequences    D  hidden size
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from searchr1_fast.config import Config
from searchr1_fast.distributed import Ranks, reshard
from searchr1_fast.losses import accumulate_metrics, value_loss
from searchr1_fast.models import Decoder
from searchr1_fast.policy import Learner, prepare_blocks, prepare_learner
from searchr1_fast.schedule import critic_learning_rate
from searchr1_fast.types import PackedBatch


class ValueModel(nn.Module):
    """A decoder without its language-model head, and a linear value head in fp32."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.decoder.lm_head = None  # its weights would be carried along for nothing
        self.value_head = nn.Linear(decoder.config.hidden_size, 1)
        self.reset_head()

    def reset_head(self) -> None:
        """Make all values zero."""
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: PackedBatch) -> torch.Tensor:  # [P] fp32
        """The value of every state in which a policy token is about to be written."""
        hidden = self.decoder.scored_hidden(batch)  # [R, D]
        head = self.value_head  # in fp32 even where the decoder computes in bf16: returns need the digits
        # Add the bias last: the output must not be a view, or an operation in place would slip past FSDP's hooks.
        return batch.spread(hidden.float() @ head.weight.float()[0]) + head.bias.float()


class Critic(Learner):
    """The value model and its optimizer."""

    def __init__(self, decoder: Decoder, config: Config, ranks: Ranks, weights: Path | None = None) -> None:
        """`decoder`: fp32, its own copy of the policy's start; with an adapter, on the policy's base (`on_same_base`).
        `weights`: as for `Policy`."""
        prepare_blocks(decoder, config)
        model = ValueModel(decoder)
        model.value_head.to(ranks.device)
        prepare_learner(model, decoder, config, ranks, weights)
        model.reset_head()
        super().__init__("critic", model, critic_learning_rate(config), config, ranks)
        self.value_clip = config.algorithm.value_clip

    @torch.no_grad()
    def values(self, batches: list[PackedBatch]) -> list[torch.Tensor]:  # [P] fp32 each
        """Values of every batch, without gradients."""
        values = [self.module(batch) for batch in batches]
        reshard(self.module)
        return values

    def update(
        self,
        batches: list[PackedBatch],
        returns: list[torch.Tensor],  # [P] fp32 each
        old_values: list[torch.Tensor],  # [P] fp32 each
        denominator: int,
    ) -> tuple[dict[str, torch.Tensor], float]:
        """Like `Policy.update`: returns sums over this rank's tokens, and the norm of the gradient."""
        totals: dict[str, torch.Tensor] = {}
        share = self.share(denominator)
        for index, (batch, target, old) in enumerate(zip(batches, returns, old_values, strict=True)):
            loss = value_loss(self.module(batch), target, old, clip=self.value_clip, denominator=share)
            self.backward(loss, is_last=index == len(batches) - 1)
            accumulate_metrics(totals, {"value_loss": loss.detach() * share})
        return totals, self.step()
