"""Shared by the tests of vLLM's engine: a stand-in for vLLM, and a check of log-probabilities.

The stand-in keeps what vLLM promises and no more. A request of token ids gets one token per step under its own seed,
with the sampler's log-probability. Weights are a copy, and loading must be given every name.
"""

from __future__ import annotations

import numpy as np
import torch

from searchr1_fast.models import Decoder
from searchr1_fast.rollout import SamplingParams
from searchr1_fast.rollout.sampling import head_logits, sample, stream_keys, uniforms
from searchr1_fast.rollout.vllm_model import Piece
from searchr1_fast.rollout.weight_handover import score

GREEDY = SamplingParams(0.0)


class StandIn:
    """vLLM as far as the engine may rely on it.

    `lost` are names that are handed over and ignored; `shows` is whether it has copies that can be inspected.
    """

    version = "0, a stand-in,"

    def __init__(self, model: Decoder, eos_ids, lost=(), shows=True) -> None:
        self.model = Decoder(model.config)
        if model.config.tie_word_embeddings:
            self.model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.head_weight))
        self.eos_ids, self.lost, self.shows = set(eos_ids), set(lost), shows
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

    def held(self, shapes):
        own = dict(self.model.named_parameters())
        return [(name, own[name].detach()) for name in shapes if self.shows]

    @torch.no_grad()
    def sleep(self):
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            parameter.uniform_(-1e-3, 1e-3, generator=generator)  # what vLLM's dummy weights are

    def close(self):
        self.requests = None

    def score(self, sequences):
        return [score(self.model, [token_ids]) for token_ids in sequences]


def check_logprobs(model, trajectories, temperature, tolerance=1e-4):
    """Require, for every policy token, the trainer's log-probability over the whole vocabulary at `temperature`."""
    for trajectory in trajectories:
        ids = torch.from_numpy(trajectory.token_ids)
        with torch.no_grad():
            table = (model.logits(ids, torch.tensor([0, len(ids)])) / temperature).log_softmax(-1)
        expected = table[:-1].gather(1, ids[1:, None])[:, 0].numpy()
        mask = trajectory.loss_mask[1:]
        np.testing.assert_allclose(trajectory.rollout_logprobs[1:][mask], expected[mask], atol=tolerance)
