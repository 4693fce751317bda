"""The environment: a list of questions, and the retriever that answers the searches.

A `DataSet` of the configuration becomes an `Environment` here and nowhere else. A generated world brings its corpus in
memory; a file of questions names its corpus or shares the training set's. Every rank builds its own (a world is a pure
function of its settings), except that each rank of a machine holds only a part of an index.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from searchr1_fast.config import Config, DataSet, RetrievalConfig
from searchr1_fast.data import read_questions
from searchr1_fast.retrieval import Retriever, open_retriever
from searchr1_fast.retrieval.protocol import Closes, Counts, Parks, Remembers, RetrievalTimeout, innermost
from searchr1_fast.retrieval.statistics import SearchStatistics
from searchr1_fast.types import Passage, Question
from searchr1_fast.world import build_world

if TYPE_CHECKING:  # dense search imports numba
    from searchr1_fast.distributed import Ranks
    from searchr1_fast.retrieval.dense import Show


def to_stderr(text: str) -> None:
    """Say on stderr that a search is tried again; used where there is no user interface to say it."""
    print(f"searchr1: {text}", file=sys.stderr, flush=True)


@dataclass
class Environment:
    """Questions over one corpus. Only one thread may search at a time."""

    questions: list[Question]
    retriever: Retriever
    topk: int = 3
    max_retries: int = 0  # of a search that missed its deadline; a server's client has its own
    say: Callable[[str], None] = to_stderr
    _counts: SearchStatistics = field(default_factory=SearchStatistics)

    def search(self, queries: Sequence[str]) -> list[list[Passage]]:
        """The rollout's `SearchFunction`: return passages for every query, or raise.

        Queries that missed the deadline are searched again; what was found meanwhile comes from the retriever's cache.
        """
        counts, started = self._counts, time.perf_counter()
        try:
            found = self._attempt(queries)
        except Exception:
            counts.failures += 1
            raise
        counts.waits.append((time.perf_counter() - started, len(queries)))
        different = len(set(queries))
        counts.queries += len(queries)
        counts.unique += different
        counts.batches += 1
        counts.batch_rows += different
        return found

    def _attempt(self, queries: Sequence[str]) -> list[list[Passage]]:
        for retry in range(1, self.max_retries + 2):
            try:
                return self.retriever.search(queries, self.topk)
            except RetrievalTimeout as error:
                self._counts.timeouts += 1
                if retry > self.max_retries:
                    attempts = "1 attempt" if retry == 1 else f"{retry} attempts"
                    raise RetrievalTimeout(f"{error}, in {attempts}") from error
                self._counts.retries += 1
                self.say(f"{error}; trying again, {retry} of {self.max_retries} times")
        raise AssertionError("an attempt returns or raises")

    def take_statistics(self) -> SearchStatistics:
        """Return the counts since the last call; a retriever that batches counts for itself."""
        taken, self._counts = self._counts, SearchStatistics()
        inner = innermost(self.retriever)
        if isinstance(inner, Counts):
            own = inner.take_statistics()
            taken.retries += own.retries
            taken.page_failures += own.page_failures
            if own.queries:
                taken.unique, taken.cache_hits = own.unique, own.cache_hits
                taken.batches, taken.batch_rows = own.batches, own.batch_rows
        return taken

    def save_searches(self, path: Path) -> None:
        """Write what the retriever remembers; nothing if it remembers nothing."""
        inner = innermost(self.retriever)
        if isinstance(inner, Remembers) and inner.identity:
            inner.save_cache(path)

    def load_searches(self, path: Path) -> str:
        """Load what `save_searches` wrote, and return what came of it as a sentence; "" if there is nothing to say."""
        inner = innermost(self.retriever)
        if not path.is_file():
            return ""
        if not (isinstance(inner, Remembers) and inner.identity):
            return "the searches that the checkpoint remembers are left out: this retriever remembers none"
        try:
            return f"{inner.load_cache(path)} searches remembered from the checkpoint"
        except ValueError as error:
            return f"the searches that the checkpoint remembers are left out: {error}"

    def park(self) -> None:
        """Give the retriever's GPU memory to others, until `unpark`; nothing to do if it has none."""
        inner = innermost(self.retriever)
        if isinstance(inner, Parks):
            inner.park()

    def unpark(self) -> None:
        """Take the GPU memory back, before the next search."""
        inner = innermost(self.retriever)
        if isinstance(inner, Parks):
            inner.unpark()

    def close(self) -> None:
        """End the retriever's threads; a search that is still waited for fails. May be called again."""
        inner = innermost(self.retriever)
        if isinstance(inner, Closes):
            inner.close()


def build_environment(
    data: DataSet,
    retrieval: RetrievalConfig,
    shared: Retriever | None = None,
    opened: dict[tuple, Retriever] | None = None,
    ranks: Ranks | None = None,
    ui: Show | None = None,
) -> Environment:
    """Build what `data` describes. `shared` serves a file of questions that names no corpus; `opened` keeps the
    retrievers of worlds, for other worlds that differ only in their questions; `ui` is told of slow work and of
    searches that are tried again. With `ranks`, all of them must call this."""
    say = to_stderr if ui is None else ui.note
    if data.world is not None:
        if retrieval.backend in ("remote", "web"):
            raise ValueError(
                f"retrieval.backend={retrieval.backend}: the server cannot know a world that is generated here; write "
                "it with `searchr1 world`, serve its corpus, and give its questions as data.questions"
            )
        world = build_world(data.world)
        questions: list[Question] = world.questions
        if retrieval.index is not None:
            raise ValueError("retrieval.index is over a corpus on disk, not over the world generated here; drop it")
        opened = {} if opened is None else opened
        if world.corpus_key not in opened:
            corpus = world.passages if retrieval.backend in ("bm25", "dense") else None
            opened[world.corpus_key] = open_retriever(retrieval, corpus)
        retriever = opened[world.corpus_key]
        return Environment(_limited(questions, data.limit), retriever, retrieval.topk, retrieval.max_retries, say)
    questions = read_questions(data.questions, limit=data.limit)
    use_shared = data.corpus is None and shared is not None
    retriever = shared if use_shared else open_retriever(retrieval, data.corpus, ranks, ui)
    return Environment(questions, retriever, retrieval.topk, retrieval.max_retries, say)


def build_environments(
    config: Config, ranks: Ranks | None = None, ui: Show | None = None
) -> tuple[Environment, dict[str, Environment]]:
    """Build the training environment, and one per evaluation set. With `ranks`, all of them must call this."""
    training = build_environment(config.data, config.retrieval, ranks=ranks, ui=ui)
    return training, evaluation_environments(config, training.retriever, ranks, ui)


def evaluation_environments(
    config: Config, shared: Retriever | None = None, ranks: Ranks | None = None, ui: Show | None = None
) -> dict[str, Environment]:
    """Build one environment per evaluation set. `shared`: the training retriever, if it is open already."""
    opened: dict[tuple, Retriever] = {}
    return {
        name: build_environment(data, config.retrieval, shared, opened, ranks, ui)
        for name, data in config.eval.sets.items()
    }


def _limited(questions: list[Question], limit: int) -> list[Question]:
    return questions[:limit] if limit else questions
