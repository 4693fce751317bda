"""Rollouts: the engine that samples turns, its lock-step twin, and the loop that searches between turns."""

from searchr1_fast.rollout.engine import Engine
from searchr1_fast.rollout.plain import PlainEngine
from searchr1_fast.rollout.sampling import SamplingParams
from searchr1_fast.rollout.search_loop import SearchLoop
from searchr1_fast.rollout.sequence import RolloutRequest
from searchr1_fast.rollout.statistics import RolloutStatistics
from searchr1_fast.rollout.vllm_engine import VllmEngine

__all__ = [
    "Engine",
    "PlainEngine",
    "RolloutRequest",
    "RolloutStatistics",
    "SamplingParams",
    "SearchLoop",
    "VllmEngine",
]
