"""The batcher's cache: bounded, saved and loaded, and refused if it belongs to other searches."""

from __future__ import annotations

import pytest
from batcher_fakes import Backend, ids_of


def test_what_was_found_is_not_searched_again(make, backend):
    retriever = make()
    before = retriever.search(["1", "2"], 3)
    assert retriever.search(["2", "1"], 3) == before[::-1]
    assert ids_of(retriever.search(["1"], 2)) == [[10, 11]]
    assert backend.searched == ["1", "2"]
    assert retriever.statistics()["num_cache_hits"] == 3


def test_the_cache_is_bounded_and_forgets_the_least_recently_used(make, backend):
    retriever = make(cache_bytes=3000, min_depth=4)
    for number in range(100):
        retriever.search(["0"], 1)
        retriever.search([str(number)], 1)
    statistics = retriever.statistics()
    assert 0 < statistics["cache_bytes"] <= 3000
    assert statistics["cache_entries"] + statistics["cache_evicted"] == 100
    assert backend.searched.count("0") == 1  # used all the time
    retriever.search(["99", "1"], 1)
    assert backend.searched[100:] == ["1"]


def test_a_result_larger_than_the_cache_is_not_kept(make, backend):
    retriever = make(cache_bytes=200, min_depth=16)
    assert ids_of(retriever.search(["1"], 1)) == [[10]]
    assert retriever.statistics()["cache_entries"] == 0


def test_a_result_larger_than_the_cache_drives_nothing_out(make, backend):
    retriever = make(cache_bytes=1000, min_depth=16)  # 16 hits take 465 bytes, 64 take 1233
    retriever.search(["1"], 1)
    assert ids_of(retriever.search(["2"], 64))[0][:2] == [20, 21]
    statistics = retriever.statistics()
    assert (statistics["cache_entries"], statistics["cache_evicted"]) == (1, 0)
    retriever.search(["1"], 1)
    assert backend.searched == ["1", "2"]


def test_saved_and_loaded(make, backend, tmp_path):
    path = tmp_path / "cache.bin"
    first = make(identity="index a")
    first.search(["1", "2", "ü"[:0] + "3"], 3)
    first.search(["1"], 40)
    first.save_cache(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.bin"]
    other = Backend()
    second = make(other, identity="index a")
    assert second.load_cache(path) == 4
    assert ids_of(second.search(["3", "1", "2"], 2)) == [[30, 31], [10, 11], [20, 21]]
    assert len(second.search(["1"], 33)[0]) == 33
    assert other.batches == []


def test_loading_keeps_the_bound_and_the_most_recent(make, backend, tmp_path):
    path = tmp_path / "cache.bin"
    big = make(min_depth=4, identity="index a")
    for number in range(50):
        big.search([str(number)], 1)
    big.save_cache(path)
    other = Backend()
    small = make(other, min_depth=4, cache_bytes=1500, identity="index a")
    small.load_cache(path)
    assert small.statistics()["cache_bytes"] <= 1500
    small.search(["49", "0"], 1)
    assert other.searched == ["0"]


def test_a_cache_of_other_searches_or_a_damaged_one_is_refused(make, backend, tmp_path):
    path = tmp_path / "cache.bin"
    retriever = make(identity="index a")
    retriever.search(["1"], 3)
    retriever.save_cache(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"other searches \(index a, here index b\)"):
        make(identity="index b").load_cache(path)
    for nameless in (make().load_cache, make().save_cache):
        with pytest.raises(ValueError, match="has no identity"):
            nameless(path)
    for length in (0, 5, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cache.bin"):
            retriever.load_cache(path)
    for place in range(8, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="altered"):
            retriever.load_cache(path)
    with pytest.raises(ValueError, match="No such file"):
        retriever.load_cache(tmp_path / "absent")
    with pytest.raises(ValueError, match="cannot write"):
        retriever.save_cache(tmp_path / "absent" / "cache.bin")
