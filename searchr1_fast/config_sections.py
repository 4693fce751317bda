"""The sections of a configuration: one frozen model per noun, every field documented, unknown keys are errors.

Each check of a field is made here, once, with a sentence that names the key. `Config` (config.py) checks what several
sections must agree on.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of every section: immutable, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class RunConfig(Section):
    name: str = "run"
    """The run's folder below `directory`."""
    directory: str = "runs"
    seed: NonNegative = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if available."""
    num_threads: NonNegative = 0
    """CPU threads of torch and numba per rank; 0 keeps torch's choice."""
    resume: bool = False
    """Continue from the run folder's newest checkpoint. Off: a folder that already holds a run is an error."""
    tensorboard: bool = True
    wandb: bool = False
    trajectories_every: NonNegative = 10
    """Write a step's trajectories every this many steps; 0: never."""


class OffloadConfig(Section):
    """What leaves the GPU between its uses. Results are the same bit for bit; on a CPU nothing is moved."""

    replica: bool = False
    """Give the update the memory of the weights that generate. It ends by writing them anew, so nothing is copied."""
    reference: bool = False
    """Keep the reference's weights in host memory between uses; one copy per step."""
    optimizer: bool = False
    """Keep Adam's moments, of policy and critic, in host memory; an optimizer step passes them through the GPU in
    pieces."""


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Section):
    """A low-rank adapter instead of all weights: the model is frozen, and alpha / rank * B A is learned per target."""

    rank: NonNegative = 0
    """0: no adapter, every weight is trained."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)
    """The layers that get an adapter, in every block."""
    path: str | None = None
    """Start from this adapter, of the same rank, alpha and layers: a peft directory, or a checkpoint's `adapter`.
    None: start from the model itself."""

    @model_validator(mode="after")
    def _ranked(self) -> LoraConfig:
        if self.path is not None and not self.rank:
            raise ValueError(
                "model.lora.path: rank 0 means that there is no adapter; set model.lora.rank, alpha and targets to "
                "those in its adapter_config.json, or drop the path"
            )
        return self

    @model_validator(mode="after")
    def _distinct(self) -> LoraConfig:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError("model.lora.targets: name at least one layer, and each once; rank 0 switches it off")
        return self


class ModelConfig(Section):
    path: str = "builtin:base"
    """A Hugging Face directory, or `builtin:base` / `builtin:instruct` for the tiny models in the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the forward and backward pass; master weights, log-probs and reductions are always fp32."""
    compile_blocks: bool = False
    """`torch.compile` all of a block but its attention. On a GPU, generation has its own kernels; a CPU needs a C++
    compiler."""
    offload: OffloadConfig = OffloadConfig()
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _has_what_leaves(self) -> ModelConfig:
        if self.lora.rank and (self.offload.replica or self.offload.reference):
            raise ValueError(
                "model.offload: with model.lora, replica and reference are the frozen base that is trained on, which "
                "stays; leave both off"
            )
        return self


class PromptConfig(Section):
    template: str = "Question: {question}\n"
    """Text with `{question}`, or one of the named templates in prompt.py: `plain`, `search_r1`."""
    chat_template: bool = False
    """Put the prompt through the tokenizer's chat template as one user turn; what ends a turn there ends one here."""


class WorldConfig(Section):
    """A generated encyclopedia (searchr1_fast/world)."""

    split: Literal["pretrain", "train", "eval"] = "train"
    """Splits have no names in common, and so no entities or facts."""
    seed: int = 0
    num_entities: Positive = 600
    style: Literal["plain", "rich"] = "plain"
    """`plain`: a few facts in one wording; `rich`: more facts and sentences, paraphrases, aliases."""
    num_questions: NonNegative = 4096
    hops: tuple[float, ...] = (1.0, 2.0, 1.0)
    """Weights of 1-, 2-, … hop questions."""
    comparison: Fraction = 0.0
    """Share of comparison questions; the others are compositional."""


class DataSet(Section):
    """Questions and what they are asked about: a generated world, or a file of questions and a corpus."""

    world: WorldConfig | None = None
    questions: str | None = None
    """JSONL `{"id","question","golden_answers"}` or Search-R1's Parquet."""
    corpus: str | None = None
    """JSONL `{"id","contents"}`; an evaluation set without one searches the training corpus."""
    limit: NonNegative = 0
    """Keep only the first so many questions; 0 keeps all."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSet:
        if (self.world is None) == (self.questions is None):
            raise ValueError("give exactly one of `world` and `questions`; to drop a recipe's world, set it to null")
        if self.world is not None and self.corpus is not None:
            raise ValueError("a world brings its own corpus; drop `corpus`")
        return self


class RetrievalConfig(Section):
    backend: Literal["bm25", "dense", "remote", "web", "none"] = "bm25"
    """`dense`: exact search over vectors. `web`: a live web search. `none`: every search finds nothing (the R1
    ablation)."""
    topk: Positive = 3
    index: str | None = None
    """`dense`: an index (`searchr1 index`), which brings its passages. Without one, the corpus is hashed in memory."""
    encoder: str | None = None
    """`dense`: the directory of the index's model, if it has moved since the index was built."""
    hashing_dimension: Annotated[int, Field(ge=64)] = 2048
    """`dense` without an index: the number of components of a hashed vector."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """`dense`: the device of vectors and encoder: `cpu`, `cuda`, `cuda:1`, …"""
    scan: Literal["float16", "int8"] = "float16"
    """`dense` on a GPU: what a pass reads. int8 codes are half the bytes, but take half as much memory again."""
    sharded: bool = True
    """`dense` with an index: each rank of a machine holds a part of it. Off: every rank holds all of it."""
    park_during_update: bool = False
    """`dense` on a GPU: move rows, codes and encoder to page-locked host memory for the update, which then has their
    GPU memory. They are copied back during the end of the step and the first turns of the next rollout."""
    url: str = "http://127.0.0.1:8000/retrieve"
    """`remote`: a server that speaks Search-R1's protocol."""
    token_variable: str = "SEARCHR1_TOKEN"
    """`remote` and `serve`: the environment variable that holds the server's bearer token, if it wants one."""
    web_engine: Literal["serper", "serpapi"] = "serper"
    """`web`: the service whose API is spoken; the key is read from SERPER_API_KEY or SERPAPI_API_KEY."""
    web_url: str | None = None
    """`web`: the URL of the service, if not its usual one."""
    web_pages: bool = False
    """`web`: read the pages that are found, and return their text around the service's snippet."""
    web_per_host: Positive = 4
    """`web`: maximum requests to one host at a time, the service's included."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    max_retries: NonNegative = 4
    bm25_k1: Annotated[float, Field(ge=0)] = 0.9
    bm25_b: Fraction = 0.4
    bm25_phrases: bool = False
    """Count pairs of neighbouring words as terms too, so that a name is found before others of the same words."""
    miss_rate: Fraction = 0.0
    """Share of queries, chosen by their text, that lose their best passage, as if the retriever sometimes missed."""
    miss_seed: int = 0


class RolloutConfig(Section):
    engine: Literal["native", "plain", "vllm"] = "native"
    """`native`: continuous batching over a KV cache kept across turns. `plain`: its lock-step twin, for comparison.
    `vllm`: vLLM in this process, on a copy of the weights that is renewed at every step; needs the extra `vllm`."""
    overlap: bool = False
    """Keep decoding while searches are in flight. Off: a step's searches run inline, and runs repeat bit for bit."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: NonNegative = 0
    """0: no limit. With `top_p` below 1.0 or `top_k` above 0, the sampler's distribution is not that of the ratio."""
    max_searches: NonNegative = 4
    """Turns that may search; one forced final turn follows."""
    max_turn_tokens: Positive = 500
    max_observation_tokens: Positive = 500
    """Passages that do not fit whole are left out; the first is cut at a word if it alone does not fit."""
    max_sequence_tokens: Positive = 4096
    """Prompt, turns and observations together."""
    max_num_seqs: Positive = 256
    """Sequences in progress at a time, including those that wait for a search."""
    cache_tokens: Positive | None = None
    """Tokens that the KV cache holds; sequences share those of a common beginning. None: enough for `max_num_seqs`
    sequences of `max_sequence_tokens`. With fewer, sequences that find no room wait, or are computed again."""
    cuda_graphs: bool = True
    """On a GPU: record a decode step once per batch size and sampling, and replay it. Off: launch kernel by kernel."""
    keep_cache: Literal["auto"] | bool = "auto"
    """On a GPU: keep the KV cache and recorded decode steps during the update. Off: the update has their memory, and
    every rollout records the steps again. `auto`: keep them if the memory planner has room for both."""
    on_search_error: Literal["stop", "drop"] = "stop"
    """What to do in training when a search has failed for good (`retrieval.max_retries`). `stop`: end the run. `drop`:
    end the search's trajectories, which then count in no mean and no update; if every search of a step fails (on all
    ranks), the run still ends. Evaluations always stop."""
    final_turn_message: str = ""
    """Environment text before the forced final turn; masked from the loss. A tag opened in it is not the policy's."""

    @property
    def is_cut(self) -> bool:
        """Whether `top_p` or `top_k` leaves tokens out of sampling."""
        return self.top_p < 1 or self.top_k > 0

    @model_validator(mode="after")
    def _fits_one(self) -> RolloutConfig:
        if self.cache_tokens is not None and self.cache_tokens < self.max_sequence_tokens:
            raise ValueError(
                f"cache_tokens, {self.cache_tokens}, is less than max_sequence_tokens, {self.max_sequence_tokens}: "
                "the longest sequence must fit"
            )
        return self

    @model_validator(mode="after")
    def _reported(self) -> RolloutConfig:
        if self.engine == "vllm" and self.is_cut and self.temperature != 1:
            raise ValueError(
                "rollout.engine: with top_p or top_k, vLLM gives the log-probabilities that the loss needs at "
                "temperature 1 only; set rollout.temperature=1, or rollout.engine=native"
            )
        return self


class AlgorithmConfig(Section):
    name: Literal["grpo", "ppo"] = "grpo"
    group_size: Positive = 8
    """Samples per question. PPO may use 1."""
    normalize_std: bool = True
    """GRPO: divide by the group's standard deviation (off: Dr. GRPO)."""
    drop_zero_variance_groups: bool = True
    mask_observations: bool = True
    """Off: retrieved tokens are trained on too (the paper's ablation)."""
    loss: Literal["ppo", "cispo", "reinforce", "gspo"] = "ppo"
    """The policy objective: PPO's clipped surrogate (also GRPO's), CISPO, REINFORCE, or GSPO, whose ratio is the whole
    trajectory's (its paper clips at 3e-4 and 4e-4). They differ when `train.num_minibatches` is above 1: on policy, the
    ratio is 1."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    dual_clip: Annotated[float, Field(ge=0)] = 0.0
    """`ppo`, `gspo`: a token with a negative advantage loses at most this many times that advantage. Above 1, and below
    `importance_cap`, which bounds it too; 0: no bound."""
    importance_cap: Annotated[float, Field(ge=0)] = 2.0
    """Truncated importance sampling: cap on the ratio of the trainer's to the sampler's probability; 0: none."""
    mismatch_mask: Literal["none", "sequence", "geometric"] = "none"
    """Leave out trajectories whose probability under the trainer is not within `mismatch_low` to `mismatch_high` times
    that under the sampler: of all policy tokens together (`sequence`), or their geometric mean (`geometric`). From a
    step's second minibatch on, the two also differ by what the updates before it changed."""
    mismatch_low: Annotated[float, Field(ge=0, lt=1)] = 0.99
    mismatch_high: Annotated[float, Field(gt=1)] = 1.01
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """0 skips the reference model."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """The estimator (Schulman's names), in the loss or in the reward; the paper's PPO has k1 in the reward."""
    kl_in_reward: bool = False
    """Subtract the KL from the token rewards (as the paper's PPO does) instead of adding it to the loss."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    gamma: Fraction = 1.0
    lam: Fraction = 1.0
    whiten_advantages: bool = True
    """PPO: zero mean, unit variance over the policy tokens of the step."""
    value_clip: Annotated[float, Field(ge=0)] = 0.5
    """0: unclipped."""
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    critic_warmup_steps: NonNegative = 0
    """Steps at the start of the run in which only the critic learns."""

    @model_validator(mode="after")
    def _consistent(self) -> AlgorithmConfig:
        if self.name == "grpo" and self.group_size < 2:
            raise ValueError("algorithm.group_size: GRPO compares samples of one question; give at least 2")
        if 0 < self.importance_cap < 1:
            raise ValueError("algorithm.importance_cap: below 1 it would cut tokens that nothing moved; give 0 or >= 1")
        if self.kl_coefficient > 0 and self.kl_kind == "k1" and not self.kl_in_reward:
            raise ValueError("algorithm.kl_kind: the gradient of k1 in the loss is zero on average; take k2 or k3")
        if self.dual_clip and (self.dual_clip <= 1 or self.loss not in ("ppo", "gspo")):
            raise ValueError("algorithm.dual_clip: give 0, or with loss ppo or gspo a number above 1")
        if self.dual_clip and 0 < self.importance_cap <= self.dual_clip:
            raise ValueError(
                f"algorithm.dual_clip: the ratio is at most algorithm.importance_cap, {self.importance_cap:g}, so that "
                f"{self.dual_clip:g} bounds nothing; give less, or importance_cap=0"
            )
        if self.mismatch_mask == "sequence" and not {"mismatch_low", "mismatch_high"} <= self.model_fields_set:
            raise ValueError(
                "algorithm.mismatch_mask: 0.99 to 1.01 suit the geometric mean; a product over hundreds of tokens "
                "strays further by rounding alone: give mismatch_low and mismatch_high, 0.3 and 3 for example"
            )
        if self.name == "grpo" and self.kl_in_reward:
            raise ValueError("algorithm.kl_in_reward: GRPO has one reward per trajectory; put the KL in the loss")
        return self


class OptimizerConfig(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up."""
    warmup_ratio: Fraction = 0.0
    """The same, as a share of the run's optimizer steps; give one of the two."""
    critic_warmup_ratio: Fraction | None = None
    """PPO: the critic's warm-up, as a share of its optimizer steps; null: as the policy's."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    final_learning_rate_ratio: Fraction = 0.0
    """`linear`, `cosine`: the share of the learning rate that is left at the end of the run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _one_warmup(self) -> OptimizerConfig:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("optimizer.warmup_ratio: warmup_steps says how long the warm-up is already; drop one")
        if self.schedule == "constant" and self.final_learning_rate_ratio:
            raise ValueError("optimizer.final_learning_rate_ratio: a constant schedule ends where it began; drop it")
        return self


class TrainConfig(Section):
    num_steps: Positive = 100
    questions_per_step: Positive = 64
    num_minibatches: Positive = 1
    """Optimizer steps per rollout; groups are never split."""
    tokens_per_microbatch: Positive = 8192
    """Packed tokens per forward pass; a longer trajectory goes alone."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes. `selective`: all but attention; `full`: whole blocks."""
    reshard_after: Literal["forward", "backward", "update"] = "forward"
    """When ranks free a block's gathered weights. `forward`: after each pass, so a micro-batch gathers them twice;
    `backward`: a micro-batch gathers them once; `update`: all micro-batches of an optimizer step together do."""
    reduce_after: Literal["microbatch", "update"] = "microbatch"
    """When ranks add up gradients. `update`: once per optimizer step; until then, every rank holds all of them."""
    eval_every: NonNegative = 10
    """0: only before and after training."""


class EvalConfig(Section):
    sets: dict[str, DataSet] = {}
    """By name, which may hold letters, digits, `_`, `.` and `-`."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""

    @model_validator(mode="after")
    def _plain_names(self) -> EvalConfig:
        for name in self.sets:
            if not re.fullmatch(r"[\w.-]+", name):  # keys of metrics.jsonl have it between slashes
                raise ValueError(f"sets: the name {name!r} may hold letters, digits, `_`, `.` and `-` only")
        return self


class CheckpointConfig(Section):
    every: NonNegative = 50
    """0: only the last."""
    keep: Positive = 2
    """How many of the newest to keep, besides the best."""
    best: str | None = None
    """An evaluation score, `<set>/em` or `<set>/<kind>/f1`: a step that improves it is saved, due or not, and kept as
    `checkpoints/best`."""
    background: bool = True
    """Write while training goes on, from a copy in host memory. Off: training waits, and needs no such memory."""
