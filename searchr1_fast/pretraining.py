"""Make the tiny models in the package, tokenizer and weights, from nothing but a seed (`searchr1 pretrain-base`).

Generated text (world/traces.py, split "pretrain") → byte-level BPE → next-token prediction on what the policy writes.
A step's data is a pure function of (seed, step), and model, optimizer and step are saved now and then, so a restart
continues where it was. A step's text comes in parts that ranks share, so one rank and two (`torchrun`) train alike.
Left out: validation during training (`searchr1 eval` measures the result).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from searchr1_kernels import linear_logprob
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from searchr1_fast.config import WorldConfig
from searchr1_fast.distributed import Ranks
from searchr1_fast.files import whole_file
from searchr1_fast.models import Decoder, DecoderConfig, TextTokenizer, load_model, load_tokenizer, save_model
from searchr1_fast.world import build_world
from searchr1_fast.world.names import name_words
from searchr1_fast.world.traces import (
    BASE_MIX,
    INSTRUCT_MIX,
    READER_MIX,
    STEM_MIX,
    Document,
    TraceMix,
    TraceWriter,
    documents,
)

EOS_TOKEN = "<|endoftext|>"
ALONE = Ranks(0, 1, torch.device("cpu"))

# Qwen2's way of splitting text before BPE, so that tags are split as they are there: "</", "search", ">\n\n".
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


ARCHITECTURE = DecoderConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    rope_theta=1e6,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result."""

    mix: TraceMix
    num_steps: int
    tokens_per_step: int
    learning_rate: float  # AdamW, on embedding, norms and biases
    matrix_learning_rate: float  # Muon, on the blocks' matrices
    warmup_steps: int
    num_layers: int = ARCHITECTURE.num_hidden_layers  # deepen() adds those that the starting model lacks
    rich_share: float = 0.55  # of documents about the rich world, at the end of the curriculum
    reading_share: tuple[float, float] = (0.15, 0.45)  # of reading exercises, at the curriculum's start and end
    recall_share: tuple[float, float] = (0.7, 0.05)  # likewise, of recall exercises
    steps_share: float = 0.15  # of questions and the relations they go through
    curriculum: tuple[float, float] = (0.06, 0.25)  # fractions of the training at which it starts and ends
    num_parts: int = 2  # of a step's tokens; ranks take turns
    num_entities: int = 20_000
    num_chains: int = 30_000
    hops: tuple[float, ...] = (2.0, 3.0, 4.0, 3.0)
    seed: int = 0


RECIPES = {
    "stem": Recipe(STEM_MIX, 4000, 8192, 3e-3, 2e-2, 50),
    "reader": Recipe(READER_MIX, 1400, 8192, 2e-3, 1.5e-2, 50, 6, rich_share=0.75, curriculum=(0.0, 0.0), seed=1),
    "base": Recipe(
        BASE_MIX,
        1200,
        8192,
        2e-3,
        1.5e-2,
        50,
        6,
        rich_share=0.75,
        reading_share=(0.4, 0.4),
        steps_share=0.25,
        curriculum=(0.0, 0.0),
        seed=3,
    ),
    "instruct": Recipe(INSTRUCT_MIX, 150, 8192, 6e-4, 4e-3, 20, 6, curriculum=(0.0, 0.0), seed=2),
}


def train_tokenizer(writers: list[TraceWriter], chains: list[list], vocab_size: int, seed: int) -> TextTokenizer:
    """Byte-level BPE over a sample of the documents; every text can be encoded, tags are ordinary text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = documents(writers, chains, [0.5] * len(writers), f"tokenizer/{seed}", 6000)
    names = [f" {word}" for word in name_words()] * 200  # every name word, with its leading space, becomes one token
    tokenizer.train_from_iterator([*("".join(text for _, text in document) for document in sample), *names], trainer)
    return TextTokenizer(tokenizer, eos_token=EOS_TOKEN)


class Batches:
    """Packed training batches: (step, part) -> (token_ids [T], cu_seqlens [S+1], rows [P], targets [P])."""

    def __init__(
        self, recipe: Recipe, tokenizer: TextTokenizer, writers: list[TraceWriter], chains: list[list]
    ) -> None:
        self.recipe, self.tokenizer, self.writers, self.chains = recipe, tokenizer, writers, chains

    def __call__(self, step: int, part: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pack documents until the token budget is full; segments are encoded separately, as they are in a rollout."""
        start, end = self.recipe.curriculum
        progress = 1.0 if end <= 0 else min(1.0, max(0.0, (step / self.recipe.num_steps - start) / (end - start)))
        rich_share = self.recipe.rich_share * progress
        shares = (self.recipe.reading_share, self.recipe.recall_share)
        reading, recall = (first + (last - first) * progress for first, last in shares)
        token_ids: list[int] = []
        learned: list[bool] = []
        ends = [0]
        chunk = 0
        while len(token_ids) < self.recipe.tokens_per_step // self.recipe.num_parts:
            batch = documents(
                self.writers,
                self.chains,
                [1 - rich_share, rich_share],
                f"{self.recipe.seed}/{step}/{part}/{chunk}",
                16,
                reading_share=reading,
                recall_share=recall,
                steps_share=self.recipe.steps_share,
            )
            chunk += 1
            for document, encodings in zip(batch, self._encode(batch), strict=True):
                for (kind, _), ids in zip(document, encodings, strict=True):
                    token_ids += ids
                    learned += [kind == "policy"] * len(ids)
                token_ids.append(self.tokenizer.eos_id)
                learned.append(True)
                ends.append(len(token_ids))
        ids = torch.tensor(token_ids)
        is_target = torch.tensor(learned)
        is_target[torch.tensor(ends[:-1])] = False  # nothing comes before a document's first token
        positions = is_target.nonzero().squeeze(1)
        return ids, torch.tensor(ends), positions - 1, ids[positions]

    def _encode(self, batch: list[Document]) -> Iterator[list[list[int]]]:
        texts = [text for document in batch for _, text in document]
        encodings = iter(self.tokenizer.backend.encode_batch(texts, add_special_tokens=False))
        for document in batch:
            yield [next(encodings).ids for _ in document]


@torch.no_grad()
def look_back(model: Decoder, strength: float = 6.5, num_pairs: int = 6) -> None:
    """Make head h of the first layer start by attending to the token h before, by biases of queries and keys.

    To copy a name, the model must know at each token what came before it; a later layer can then look for the place
    where the same token came before. With rotary angles this takes only biases, but these grow from zero so slowly that
    1,600 steps were not enough, and the model never learned to copy from a passage. With biases
    a (cos(f_i h), sin(f_i h)) for queries and a (1, 0) for keys, in the pairs i of high frequency f_i, the scores gain
    a^2 sum_i cos(f_i (distance - h)): highest at distance h.
    """
    config, attention = model.config, model.layers[0].self_attn
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(num_pairs) / half)  # [num_pairs]
    query = attention.q_proj.bias.view(config.num_attention_heads, 2, half)
    key = attention.k_proj.bias.view(config.num_key_value_heads, 2, half)
    for head in range(1, config.num_attention_heads):
        query[head, 0, :num_pairs] = strength * torch.cos(frequencies * head)
        query[head, 1, :num_pairs] = -strength * torch.sin(frequencies * head)
        key[head * config.num_key_value_heads // config.num_attention_heads, 0, :num_pairs] = strength


@torch.no_grad()
def deepen(model: Decoder, num_layers: int) -> Decoder:
    """A model of `num_layers` that computes exactly what `model` does: the new layers among the old add nothing yet.

    New layers write nothing because the last matrices of their attention and MLP are zero (Zhang et al. 2019, Fixup,
    start residual branches this way). Deepening a trained model costs less than training a deep one from scratch (Gong
    et al. 2019, progressive stacking): looking words up, which took four layers 40 M tokens, works from the first step.
    """
    num_old = model.config.num_hidden_layers
    num_new = num_layers - num_old
    if num_new < 0:
        raise ValueError(f"pretrain-base: --from has {num_old} layers, more than the {num_layers} of this recipe")
    deep = Decoder(replace(model.config, num_hidden_layers=num_layers))
    places = [math.ceil(k * num_old / (num_new + 1)) for k in range(1, num_new + 1)]  # before which old layer
    order = sorted([(i, 1) for i in range(num_old)] + [(place, 0) for place in places])
    old = iter(model.layers)
    for layer, (_, is_old) in zip(deep.layers, order, strict=True):
        if is_old:
            layer.load_state_dict(next(old).state_dict())
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    layers = {name: tensor for name, tensor in deep.state_dict().items() if name.startswith("model.layers.")}
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    deep.load_state_dict(layers | rest)
    return deep


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then constant, then linear decay to zero over the last 30 %."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    descent = min(1.0, (recipe.num_steps - step) / (0.3 * recipe.num_steps))
    return warmup * descent


def make_optimizers(model: Decoder, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def pretrain(
    variant: str,
    output: Path,
    recipe: Recipe,
    start: Path | None,
    save_every: int = 200,
    ranks: Ranks = ALONE,
) -> None:
    """Train `variant` into `output`; continue from `output/state.pt` if there is one of the same recipe."""
    if recipe.num_parts % ranks.world_size:
        raise ValueError(f"pretrain-base: {ranks.world_size} ranks cannot share {recipe.num_parts} parts evenly")
    model = _first_model(recipe, start)
    writers, chains = _make_writers(recipe)
    state_path = output / "state.pt"
    if ranks.is_main:
        output.mkdir(parents=True, exist_ok=True)
        if start is not None:
            load_tokenizer(start).save(output)
        elif not (output / "tokenizer.json").is_file():
            train_tokenizer(writers, chains, ARCHITECTURE.vocab_size, recipe.seed).save(output)
    ranks.barrier()
    tokenizer = load_tokenizer(output)
    optimizers = make_optimizers(model, recipe)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first = _load_state(state_path, recipe, model, optimizers) if state_path.is_file() else 0
    bf16_model = Decoder(model.config).bfloat16()
    batches = Batches(recipe, tokenizer, writers, chains)
    parts = range(ranks.rank, recipe.num_parts, ranks.world_size)
    started, num_tokens, window = time.monotonic(), 0, []
    with ThreadPoolExecutor(1) as ahead:
        pending = [ahead.submit(batches, first, part) for part in parts]
        for step in range(first, recipe.num_steps):
            ready = [future.result() for future in pending]
            pending = [ahead.submit(batches, step + 1, part) for part in parts]
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * learning_rate_factor(step, recipe)
            loss, tokens = _gradients(model, bf16_model, ready, ranks)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            num_tokens += tokens
            window = [*window[-19:], loss]
            if (step + 1) % 20 == 0 and ranks.is_main:
                rate = num_tokens / (time.monotonic() - started)
                mean = sum(window) / len(window)
                print(
                    f"{variant} step {step + 1}/{recipe.num_steps}  loss {mean:.4f}  {rate:,.0f} tokens/s", flush=True
                )
            if ((step + 1) % save_every == 0 or step + 1 == recipe.num_steps) and ranks.is_main:
                _save_state(state_path, step + 1, recipe, model, optimizers)
    if ranks.is_main:
        save_model(model, output, dtype=torch.bfloat16)
        print(f"{variant}: {num_tokens:,} tokens, weights in {output}; remove {state_path.name} before shipping")
    ranks.barrier()


def _first_model(recipe: Recipe, start: Path | None) -> Decoder:
    """The model that a recipe starts from."""
    torch.manual_seed(recipe.seed)
    if start is not None:
        return deepen(load_model(start), recipe.num_layers)
    model = Decoder(replace(ARCHITECTURE, num_hidden_layers=recipe.num_layers))
    look_back(model)
    return model


def _gradients(model: Decoder, bf16_model: Decoder, ready: list[tuple], ranks: Ranks) -> tuple[float, int]:
    """Put the gradients of the mean loss over all targets of the step into `model`; -> that loss and the step's number
    of tokens, over all ranks."""
    with torch.no_grad():
        for master, working in zip(model.parameters(), bf16_model.parameters(), strict=True):
            working.copy_(master)
    loss = sum(_backward(model, bf16_model, *batch) for batch in ready)
    counts = (
        torch.tensor([len(batch[3]) for batch in ready]).sum(),
        torch.tensor([len(batch[0]) for batch in ready]).sum(),
    )
    gradients = [parameter.grad for parameter in model.parameters()]
    sums = torch.cat([torch.stack([loss, *counts]).float(), *(gradient.flatten() for gradient in gradients)])
    loss, num_targets, num_tokens = ranks.all_reduce(sums)[:3].tolist()
    pieces = sums[3:].div_(num_targets).split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))
    return loss / num_targets, int(num_tokens)


def _backward(
    model: Decoder,  # fp32: master weights, gets the gradients
    bf16_model: Decoder,  # bf16: does the work, 1.6 times as fast on a CPU with avx512_bf16
    token_ids: torch.Tensor,  # [T] int64
    cu_seqlens: torch.Tensor,  # [S+1] int64
    rows: torch.Tensor,  # [P] int64
    targets: torch.Tensor,  # [P] int64
) -> torch.Tensor:  # [] fp32: summed over targets
    """Add the gradients of one part."""
    hidden = bf16_model.hidden(token_ids, cu_seqlens, rows)
    loss = -linear_logprob(hidden.float(), bf16_model.head_weight.float(), targets).sum()
    loss.backward()
    for master, working in zip(model.parameters(), bf16_model.parameters(), strict=True):
        gradient, working.grad = working.grad.float(), None
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    return loss.detach()


def _make_writers(recipe: Recipe) -> tuple[list[TraceWriter], list[list]]:
    writers, chains = [], []
    for style in ("plain", "rich"):
        world = build_world(
            WorldConfig(
                split="pretrain",
                seed=recipe.seed,
                num_entities=recipe.num_entities,
                style=style,
                num_questions=recipe.num_chains,
                hops=recipe.hops,
                comparison=0.05,
            )
        )
        writers.append(TraceWriter(world, recipe.mix))
        chains.append(world.chains())
    return writers, chains


def _identity(recipe: Recipe) -> str:
    """What a saved state must match for training to continue from it."""
    return json.dumps(asdict(recipe) | {"architecture": asdict(ARCHITECTURE)})


def _load_state(path: Path, recipe: Recipe, model: Decoder, optimizers: list[torch.optim.Optimizer]) -> int:
    """Restore model and optimizers; return the number of steps done."""
    state = torch.load(path, weights_only=True)
    if state["recipe"] != _identity(recipe):
        raise ValueError(f"{path} is of another recipe; remove {path.parent} to begin anew")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    print(f"going on from step {state['step']} of {recipe.num_steps}")
    return state["step"]


def _save_state(path: Path, step: int, recipe: Recipe, model: Decoder, optimizers: list[torch.optim.Optimizer]) -> None:
    state = {
        "step": step,
        "recipe": _identity(recipe),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    with whole_file(path) as temporary:
        torch.save(state, temporary)
