"""An index sharded over ranks finds what one rank would, at any time and in any number of searches, or names an error.

The ranks of most tests are threads of one process, which the sockets and the shared memory cannot tell from processes.
`test_two_processes` starts two processes with gloo.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("searchr1_fast._C", reason="the batcher is not compiled")

from commands import environment

from searchr1_fast.retrieval import sharded_rows
from searchr1_fast.retrieval.memory_plan import MAX_QUERIES
from searchr1_fast.retrieval.protocol import RetrievalError
from searchr1_fast.retrieval.rows import HostRows, cut, merge
from searchr1_fast.retrieval.sharded_rows import open_sharded

DIMENSION = 16
ROWS = np.random.default_rng(0).integers(-2, 3, (333, DIMENSION)).astype(np.float16)  # many scores are equal
NUM_ROWS = len(ROWS)
QUERIES = np.random.default_rng(1).integers(-3, 4, (MAX_QUERIES + 40, DIMENSION)).astype(np.float32)


class ThreadPeers:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, values: dict) -> None:
        self.rank, self.world_size = rank, world_size
        self._barrier, self._values = barrier, values

    def gather(self, value):
        self._values[self.rank] = value
        self._barrier.wait(30)
        values = [self._values[rank] for rank in range(self.world_size)]
        self._barrier.wait(30)
        return values


def open_part(begin: int, end: int) -> HostRows:
    return HostRows(cut([(0, ROWS[:100]), (100, ROWS[100:])], begin, end))


def on_ranks(world_size: int, open_one) -> list:
    """-> [open_one(peers)] of every rank, called at once; a rank that raises has its exception as the result."""
    barrier, values = threading.Barrier(world_size), {}

    def attempt(rank):
        try:
            return open_one(ThreadPeers(rank, world_size, barrier, values))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(attempt, range(world_size)))


def open_ranks(world_size: int, part=open_part, num_rows=NUM_ROWS) -> list:
    return on_ranks(world_size, lambda peers: open_sharded(peers, num_rows, DIMENSION, "index", part, 30.0))


@pytest.fixture(scope="module")
def alone():
    return open_part(0, len(ROWS))


@pytest.fixture
def three():
    ranks = open_ranks(3)
    yield ranks
    for rows in ranks:
        rows.close()


def check_same(one, other) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_every_rank_finds_what_one_would(alone, three):
    for number, (begin, end, k) in enumerate(
        [(0, 5, 3), (3, 4, 10**6), (0, 0, 2), (0, len(QUERIES), 16), (7, 19, 111)]
    ):
        rows = three[number % 3]
        assert len(rows) == len(ROWS)
        check_same(rows.search(QUERIES[begin:end], k), alone.search(QUERIES[begin:end], k))


def test_ranks_take_no_turns(alone, three):
    """One searches once, one many times, one later; the others' threads answer meanwhile."""
    check_same(three[0].search(QUERIES[:3], 4), alone.search(QUERIES[:3], 4))
    for turn in range(20):
        check_same(three[1].search(QUERIES[turn : turn + 2], 4), alone.search(QUERIES[turn : turn + 2], 4))
    check_same(three[2].search(QUERIES[:30], 7), alone.search(QUERIES[:30], 7))


def test_all_at_once(alone, three):
    """Several threads of several ranks; answers exceed a socket's buffer, so a writer must be read from meanwhile."""
    tasks = [(rank, begin, k) for begin in range(0, 400, 50) for rank in range(3) for k in (1, 5, len(ROWS))]

    def search(task):
        rank, begin, k = task
        return three[rank].search(QUERIES[begin : begin + 25 * (1 + rank)], k)

    with ThreadPoolExecutor(9) as pool:
        for (rank, begin, k), found in zip(tasks, pool.map(search, tasks), strict=True):
            check_same(found, alone.search(QUERIES[begin : begin + 25 * (1 + rank)], k))


class Recording:
    """Rows that record the searches since they were opened, and wait for permission to answer."""

    def __init__(self, rows, go: threading.Event) -> None:
        self.rows, self.go, self.calls = rows, go, []
        go.set()

    def __len__(self):
        return len(self.rows)

    def search(self, vectors, k):
        self.calls.append((len(vectors), k))
        assert self.go.wait(30)
        return self.rows.search(vectors, k)


def test_requests_that_come_together_are_one_search(alone):
    go = threading.Event()
    parts = {}

    def part(begin, end):
        parts[begin] = Recording(open_part(begin, end), go)
        return parts[begin]

    ranks = open_ranks(3, part)
    first = parts[0]
    go.clear()
    assert first.calls == [(1, 1)]  # before anyone can ask, so that nobody waits for a first search to compile
    first.calls.clear()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ranks[0].search, QUERIES[:2], 3)]
        wait_for(lambda: len(first.calls) == 1)
        waiting += [pool.submit(ranks[1].search, QUERIES[2:7], 9), pool.submit(ranks[2].search, QUERIES[7:8], 4)]
        # They have asked once the shared memory holds their queries, and the sockets the requests.
        wait_for(lambda: all((ranks[1]._link.queries[p][:n] == q).all() for p, n, q in
                             ((1, 5, QUERIES[2:7]), (2, 1, QUERIES[7:8]))))  # fmt: skip
        time.sleep(0.2)
        go.set()
        found = [future.result(30) for future in waiting]
    for (begin, end, k), hits in zip(((0, 2, 3), (2, 7, 9), (7, 8, 4)), found, strict=True):
        check_same(hits, alone.search(QUERIES[begin:end], k))
    assert first.calls == [(2, 3), (6, 9)]
    for rows in ranks:
        rows.close()


def test_batches_are_bounded():
    requests = [(0, 300, 1), (1, 200, 2), (2, 13, 3), (3, MAX_QUERIES, 4), (4, 1, 5)]
    assert [[place for place, _, _ in batch] for batch in sharded_rows._batches(requests)] == [[0, 1], [2], [3], [4]]
    assert list(sharded_rows._batches([])) == []


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_more_ranks_than_rows(num_rows):
    ranks = open_ranks(4, num_rows=num_rows)
    alone = open_part(0, num_rows)
    for rows in ranks:
        check_same(rows.search(QUERIES[:9], 3), alone.search(QUERIES[:9], 3))
    for rows in ranks:
        rows.close()


# ------------------------------------------------------------------------------------------------------------- errors


def test_a_rank_that_is_gone_is_named_at_once(three):
    three[1].close()
    for _ in range(2):  # final
        with pytest.raises(RetrievalError, match="rank 1 is gone, with its part of the index"):
            three[0].search(QUERIES[:3], 4)
    with pytest.raises(RetrievalError, match="was closed"):
        three[1].search(QUERIES[:3], 4)


def test_a_rank_that_hangs_is_named(alone):
    go = threading.Event()
    ranks = open_ranks(2, lambda begin, end: Recording(open_part(begin, end), go) if begin else open_part(begin, end))
    go.clear()
    ranks[0]._timeout = 0.3
    with pytest.raises(RetrievalError, match=r"no answer from rank 1 within 0\.3 s"):
        ranks[0].search(QUERIES[:3], 4)
    go.set()
    with pytest.raises(RetrievalError, match="no answer from rank 1"):  # its late answer must not pass for the next one
        ranks[0].search(QUERIES[3:6], 4)
    check_same(ranks[1].search(QUERIES[:3], 4), alone.search(QUERIES[:3], 4))
    for rows in ranks:
        rows.close()


def test_a_rank_may_close_while_it_searches(alone):
    """Its own thread then has nobody to answer, and ends; those of the others go on."""
    go = threading.Event()
    parts = []

    def part(begin, end):
        parts.append(open_part(begin, end) if begin else Recording(open_part(begin, end), go))
        return parts[-1]

    ranks = open_ranks(2, part)
    recording = next(part for part in parts if isinstance(part, Recording))
    go.clear()
    with ThreadPoolExecutor(2) as pool:
        search = pool.submit(ranks[0].search, QUERIES[:3], 4)
        wait_for(lambda: len(recording.calls) == 2)
        close = pool.submit(ranks[0].close)
        with pytest.raises(RetrievalError, match="rank [01] is gone"):
            search.result(30)
        go.set()
        close.result(30)
    ranks[1].close()


def test_a_rank_closes_though_its_part_does_not_come_back(monkeypatch, capsys):
    """Its rows may be parked, for example, and a failed update does not unpark them."""
    monkeypatch.setattr(sharded_rows, "_CLOSING_SECONDS", 0.05)
    go = threading.Event()
    ranks = open_ranks(2, lambda begin, end: open_part(begin, end) if begin else Recording(open_part(begin, end), go))
    recording = ranks[0]._own
    go.clear()
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(ranks[1].search, QUERIES[:3], 4)
        wait_for(lambda: len(recording.calls) == 2)
        ranks[0].close()
        assert "did not end within 0.05 s of closing; left behind" in capsys.readouterr().err
        go.set()
        with pytest.raises(RetrievalError, match="rank 0 is gone"):
            ranks[1].search(QUERIES[3:6], 4)
        assert search.exception(30) is None or "is gone" in str(search.exception())
    ranks[1].close()


def test_a_part_that_fails_is_named():
    class Breaking(Recording):
        def search(self, vectors, k):
            if self.calls:
                raise RuntimeError("CUDA error: the GPU fell off the bus")
            return super().search(vectors, k)

    go = threading.Event()
    ranks = open_ranks(2, lambda begin, end: Breaking(open_part(begin, end), go) if begin else open_part(begin, end))
    for rows in ranks:
        with pytest.raises(RetrievalError, match="rank 1 could not search its part: RuntimeError: CUDA error: the GPU"):
            rows.search(QUERIES[:3], 4)
    for rows in ranks:
        rows.close()


def test_a_part_that_cannot_be_opened_fails_every_rank():
    def part(begin, end):
        if begin:
            raise ValueError("the index does not fit")
        return open_part(begin, end)

    found = open_ranks(2, part)
    assert [type(error) for error in found] == [ValueError, ValueError]
    assert str(found[0]) == "rank 1 could not open its part of the index: ValueError: the index does not fit"
    assert str(found[1]) == "the index does not fit"


class SilentPeers(ThreadPeers):
    """Two ranks, the second of which gave this address and did nothing else."""

    def __init__(self, path: str) -> None:
        super().__init__(0, 2, threading.Barrier(1), {})
        self._path = path

    def gather(self, value):
        machine, _, identity = value
        return [value, (machine, self._path, identity)]


def test_a_rank_that_does_not_link_up_is_named(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "shard"))
        listener.listen()  # accepts a connection, and never makes its own
        with pytest.raises(RetrievalError, match=r"rank 1 did not link up within 0\.2 s"):
            open_sharded(SilentPeers(str(tmp_path / "shard")), NUM_ROWS, DIMENSION, "index", open_part, 0.2)
    with pytest.raises(RetrievalError, match="rank 1 ended before it linked up"):
        open_sharded(SilentPeers(str(tmp_path / "nobody")), NUM_ROWS, DIMENSION, "index", open_part, 0.2)


class BrokenPeers(SilentPeers):
    """The second rank ends between its connection and its greeting."""

    def gather(self, value):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(value[1])
        return super().gather(value)


def test_a_rank_that_ends_while_it_links_up_is_an_error_of_retrieval(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "shard"))
        listener.listen()
        with pytest.raises(RetrievalError, match="of rank 1 one ended while it linked up"):
            open_sharded(BrokenPeers(str(tmp_path / "shard")), NUM_ROWS, DIMENSION, "index", open_part, 5.0)


def test_other_indexes_are_refused():
    found = on_ranks(2, lambda peers: open_sharded(peers, len(ROWS), DIMENSION, f"index {peers.rank}", open_part, 30.0))
    assert all(isinstance(error, ValueError) and "different indexes" in str(error) for error in found)


def test_every_machine_holds_everything(monkeypatch):
    """Ranks that cannot reach each other's sockets are on different machines."""
    monkeypatch.setattr(sharded_rows, "meet", lambda peers, *rest: meet_on(peers.rank // 2, peers, *rest))
    from searchr1_fast.retrieval import shard_link

    names = threading.local()
    monkeypatch.setattr(shard_link, "_machine", lambda: names.machine)

    def meet_on(machine, peers, *rest):
        names.machine = (machine,)
        return shard_link.meet(peers, *rest)

    shares = []
    ranks = open_ranks(3, lambda begin, end: shares.append((begin, end)) or open_part(begin, end))
    assert sorted(shares) == [(0, 166), (0, 333), (166, 333)]
    assert isinstance(ranks[2], HostRows)
    assert ranks[1]._link.ranks == [0, 1]
    for rows in ranks[:2]:
        rows.close()


def test_nothing_is_left_over(three, alone):
    check_same(three[0].search(QUERIES[:3], 4), alone.search(QUERIES[:3], 4))
    names = [rows._link for rows in three]
    for rows in three:
        rows.close()
    assert all(connection.fileno() == -1 for link in names for connection in (*link.asks, *link.answers))
    assert not [thread for thread in threading.enumerate() if thread.name == "shard"]


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------- processes


def test_two_processes(tmp_path):
    """Two ranks with gloo, through the configuration and the batcher; see two_searchers.py."""
    # One of them is killed at the end, and the other learns of it.
    from searchr1_fast.config import WorldConfig
    from searchr1_fast.data import write_corpus
    from searchr1_fast.retrieval.encoder_hashing import HashingEncoder
    from searchr1_fast.retrieval.encoders import EncodingSource
    from searchr1_fast.retrieval.index_build import build_index
    from searchr1_fast.world import build_world

    class Silent:
        def phase(self, name, total=None):
            from contextlib import nullcontext

            return nullcontext(lambda finished, total: None)

    world = build_world(WorldConfig(split="train", num_entities=60, num_questions=40, hops=(1.0,)))
    write_corpus(tmp_path / "corpus.jsonl", world.passages)
    build_index(tmp_path / "index", tmp_path / "corpus.jsonl", EncodingSource(HashingEncoder(64)), Silent())
    (tmp_path / "queries.json").write_text(json.dumps([question.text for question in world.questions]))
    (tmp_path / "questions.jsonl").write_text('{"id": "a", "question": "Who?", "golden_answers": ["x"]}\n')
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(Path(__file__).with_name("two_searchers.py")), str(tmp_path)]
    processes = [
        subprocess.Popen(
            command,
            env=environment(**shared, RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for rank in range(2)
    ]
    outputs, errors = zip(*[process.communicate(timeout=300) for process in processes], strict=True)
    assert [process.returncode for process in processes] == [0, 77], "\n".join(errors)
    report = json.loads((tmp_path / "rank0.json").read_text())
    assert outputs == ("2 ranks hold the index; their hits are merged in C++\n", "")
    assert report == {"turns": [12, 3], "equal": [True, True], "error": True}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_plain_merge_is_the_one_in_cpp():
    from searchr1_fast import _C

    generator = np.random.default_rng(3)
    parts = [(generator.integers(0, 4, (5, w)).astype(np.float32), np.arange(5 * w).reshape(5, w) * 3 + p)
             for p, w in enumerate((4, 1, 7))]  # fmt: skip
    check_same(merge(parts, 6), _C.merge_topk([scores for scores, _ in parts], [rows for _, rows in parts], 6))
