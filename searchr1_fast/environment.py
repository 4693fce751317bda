"""What questions are asked of: a list of questions, and the retriever that answers the searches.

A `DataSet` of the configuration becomes an `Environment` here and nowhere else: a generated world brings its corpus in
memory, a file of questions names its corpus or shares the training set's. Every rank builds its own (a world is a pure
function of its settings); of an index the ranks of a machine hold a part each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from searchr1_fast.config import Config, DataSet, RetrievalConfig
from searchr1_fast.data import read_questions
from searchr1_fast.retrieval import Retriever, open_retriever
from searchr1_fast.types import Passage, Question
from searchr1_fast.world import build_world

if TYPE_CHECKING:  # dense search imports numba
    from searchr1_fast.distributed import Ranks
    from searchr1_fast.retrieval.dense import Show


@dataclass(frozen=True)
class Environment:
    """Questions over one corpus."""

    questions: list[Question]
    retriever: Retriever
    topk: int = 3

    def search(self, queries: Sequence[str]) -> list[list[Passage]]:
        """The `SearchFunction` that the rollout is given."""
        return self.retriever.search(queries, self.topk)


def build_environment(
    data: DataSet,
    retrieval: RetrievalConfig,
    shared: Retriever | None = None,
    opened: dict[tuple, Retriever] | None = None,
    ranks: Ranks | None = None,
    ui: Show | None = None,
) -> Environment:
    """Build what `data` describes. `shared` serves a file of questions that names no corpus; `opened` remembers the
    retrievers of worlds, for others that differ in their questions alone. With `ranks` all of them must call this."""
    if data.world is not None:
        if retrieval.backend == "remote":
            raise ValueError(
                "retrieval.backend=remote: the server cannot know a world that is generated here; write it with "
                "`searchr1 world`, serve its corpus, and give its questions as data.questions"
            )
        world = build_world(data.world)
        questions: list[Question] = world.questions
        if retrieval.index is not None:
            raise ValueError("retrieval.index is over a corpus on disk, not over the world generated here; drop it")
        opened = {} if opened is None else opened
        if world.corpus_key not in opened:
            corpus = world.passages if retrieval.backend in ("bm25", "dense") else None
            opened[world.corpus_key] = open_retriever(retrieval, corpus)
        return Environment(_limited(questions, data.limit), opened[world.corpus_key], retrieval.topk)
    questions = read_questions(data.questions, limit=data.limit)
    if data.corpus is None and shared is not None:
        return Environment(questions, shared, retrieval.topk)
    return Environment(questions, open_retriever(retrieval, data.corpus, ranks, ui), retrieval.topk)


def build_environments(
    config: Config, ranks: Ranks | None = None, ui: Show | None = None
) -> tuple[Environment, dict[str, Environment]]:
    """The training environment, and one per evaluation set. With `ranks` all of them must call this."""
    training = build_environment(config.data, config.retrieval, ranks=ranks, ui=ui)
    return training, evaluation_environments(config, training.retriever, ranks, ui)


def evaluation_environments(
    config: Config, shared: Retriever | None = None, ranks: Ranks | None = None, ui: Show | None = None
) -> dict[str, Environment]:
    """One environment per evaluation set. `shared`: the training retriever, where it is open already."""
    opened: dict[tuple, Retriever] = {}
    return {
        name: build_environment(data, config.retrieval, shared, opened, ranks, ui)
        for name, data in config.eval.sets.items()
    }


def _limited(questions: list[Question], limit: int) -> list[Question]:
    return questions[:limit] if limit else questions
