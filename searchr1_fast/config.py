"""The whole configuration: its sections (config_sections.py) together, read from YAML files and overrides.

A run is a YAML file plus dotted overrides (`optimizer.learning_rate=1e-4`). A file may build on others: `extends` names
them, as paths relative to its own folder. They are read first, in order, then the file itself, then the overrides. What
comes later wins, key by key; a list or a null replaces what was there. Derived values are properties, not fields. Each
check across sections is made here, once, with a sentence that names the key.
"""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError, model_validator

from searchr1_fast.config_sections import (
    AlgorithmConfig,
    CheckpointConfig,
    DataSet,
    EvalConfig,
    LoraConfig,
    LoraTarget,
    ModelConfig,
    OffloadConfig,
    OptimizerConfig,
    PromptConfig,
    RetrievalConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TrainConfig,
    WorldConfig,
)

__all__ = [
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "DataSet",
    "EvalConfig",
    "LoraConfig",
    "LoraTarget",
    "ModelConfig",
    "OffloadConfig",
    "OptimizerConfig",
    "PromptConfig",
    "RetrievalConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
    "WorldConfig",
    "load_config",
]

EXTENDS = "extends"  # the key under which a file names the files it builds on


class Config(Section):
    """Everything a run needs."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    data: DataSet = DataSet(world=WorldConfig())
    retrieval: RetrievalConfig = RetrievalConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _has_a_critic(self) -> Config:
        if self.optimizer.critic_warmup_ratio is not None and self.algorithm.name != "ppo":
            raise ValueError(
                f"optimizer.critic_warmup_ratio: {self.algorithm.name.upper()} has no critic; drop it, or set "
                "algorithm.name=ppo"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_the_best(self) -> Config:
        best = self.checkpoint.best
        if best is not None and best.partition("/")[0] not in self.eval.sets:
            sets = ", ".join(self.eval.sets) or "none"
            raise ValueError(f"checkpoint.best: `{best}` must begin with the name of an evaluation set, here {sets}")
        return self

    @model_validator(mode="after")
    def _reported_in_evaluations(self) -> Config:
        if self.rollout.engine == "vllm" and self.rollout.is_cut and self.eval.temperature not in (0, 1):
            raise ValueError(
                f"eval.temperature: {self.eval.temperature} (--temperature) does not go with rollout.engine=vllm and "
                "rollout.top_p or rollout.top_k, with which vLLM gives log-probabilities at temperature 1 only; set it "
                "to 0 or 1, or rollout.engine=native"
            )
        return self

    @property
    def run_directory(self) -> Path:
        """`run.directory/run.name`."""
        return Path(self.run.directory) / self.run.name

    def to_yaml(self) -> str:
        """The whole configuration, defaults included; `load_config` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file (None: the defaults) and apply `section.key=value` overrides, values read as YAML.

    Raises a one-sentence ValueError for a missing file, broken YAML, an unknown key (naming the nearest), a bad value.
    """
    values: dict[str, Any] = {} if path is None else _read_file(Path(path), ())
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(_describe(error)) from error


def _read_file(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file's values over those of the files that it extends. `below`: the files that led here, resolved."""
    if not path.is_file():
        nearest = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
        hint += f"; {below[-1]} extends it" if below else ""
        raise ValueError(f"no configuration file {path}{hint}")
    here = path.resolve()
    if here in below:
        chain = " -> ".join(file.name for file in (*below[below.index(here) :], here))
        raise ValueError(f"{path} extends itself: {chain}")
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, _UniqueKeys) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections (`train:`, `rollout:`, …), not a {type(values).__name__}")
    parents = values.pop(EXTENDS, [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) and parent for parent in parents):
        raise ValueError(f"{path}: `{EXTENDS}` must be the path of a configuration file, or a list of paths")
    merged: dict[str, Any] = {}
    for parent in parents:
        _merge(merged, _read_file(path.parent / parent, (*below, here)))
    _merge(merged, values)
    return merged


class _UniqueKeys(yaml.SafeLoader):
    """Reject a key that stands twice in one place: YAML takes the last, and the settings below the first are lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    """Merge `over` into `values`, in place: sections key by key, everything else whole."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    *parents, leaf = key.split(".")
    node = values
    for name in parents:
        child = node.setdefault(name, {})
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {name} is a value, not a section")
        node = child
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML") from error
    if isinstance(value, str):
        value = _number_or_text(value)
    node[leaf] = value


def _number_or_text(text: str) -> float | str:
    """Read `1e-4` as the number that people mean; YAML reads it as text (it wants 1.0e-4)."""
    try:
        return float(text)
    except ValueError:
        return text


def _describe(error: ValidationError) -> str:
    """Describe each mistake in one sentence; for an unknown key, name the nearest known one."""
    sentences = []
    for item in error.errors():
        location = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1]) + ([EXTENDS] if len(item["loc"]) == 1 else [])
            nearest = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
            parent = location.rpartition(".")[0]
            hint = f"known here: {', '.join(known)}"
            if nearest:
                hint = f"did you mean `{f'{parent}.' if parent else ''}{nearest[0]}`?"
            sentences.append(f"unknown key `{location}`: {hint}")
        elif item["type"] in ("model_type", "dict_type"):
            sentences.append(f"`{location}`: must be a section of keys, not {item['input']!r}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] != "value_error":  # pydantic's own messages do not say what was given
                message += f", got {item['input']!r}"
            names_its_key = not location or message.startswith(f"{location}.")
            sentences.append(message if names_its_key else f"`{location}`: {message}")
    return "; ".join(sentences)


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `location`."""
    section: Any = Config
    names = list(location)
    while names and section is not None:
        annotation = section.model_fields[str(names.pop(0))].annotation
        if get_origin(annotation) is dict and names:
            names.pop(0)  # the user's own name for an entry, as in eval.sets.<name>
        section = _section_type(annotation)
    return list(section.model_fields) if section is not None else []


def _section_type(annotation: Any) -> type[Section] | None:
    """The section behind `Section`, `Section | None` or `dict[str, Section]`."""
    candidates = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType, dict) else (annotation,)
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
