"""The generated encyclopedia: facts are in their passages, splits never overlap, questions have their answers."""

import itertools
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.config import WorldConfig
from searchr1_fast.retrieval.bm25 import BM25Retriever
from searchr1_fast.reward import normalize_answer
from searchr1_fast.world import build_world
from searchr1_fast.world.names import SPLIT_RESIDUES, name_capacity, name_words, word_tuple
from searchr1_fast.world.world import apportion


def make_world(**changes):
    return build_world(WorldConfig(**(dict(num_entities=300, num_questions=200) | changes)))


@pytest.mark.parametrize("style", ["plain", "rich"])
def test_every_hop_can_be_read_in_its_passage(style):
    world = make_world(style=style, hops=(1, 1, 1, 1), comparison=0.1)
    text_of = {passage.title: passage.text for passage in world.passages}
    for chain in world.chains():
        for entity, fact in zip(chain.entities, chain.facts, strict=True):
            assert fact.mention in text_of[entity.name]
            assert fact.mention in fact.answers
        if chain.question.kind != "comparison":
            assert chain.question.golden_answers == chain.facts[-1].answers
            # Hop i+1 starts from what hop i found, by its name or its alias.
            for fact, entity in zip(chain.facts, chain.entities[1:], strict=False):
                assert entity.name in fact.answers
                assert fact.mention in (entity.name, entity.alias)


def test_comparison_answers_are_right():
    for chain in make_world(num_questions=50, comparison=1.0).chains():
        years = [int(fact.mention) for fact in chain.facts]
        assert chain.question.golden_answers[0] == chain.entities[years.index(min(years))].name
        assert all(entity.name in chain.question.text for entity in chain.entities)


@pytest.mark.parametrize("style", ["plain", "rich"])
def test_splits_share_no_entity_and_no_answer(style):
    worlds = [make_world(split=split, style=style, num_entities=2000) for split in SPLIT_RESIDUES]
    names = [{p.title for p in world.passages} | _aliases(world) for world in worlds]
    for first, second in itertools.combinations(names, 2):
        assert not first & second
    for first, second in itertools.combinations(worlds, 2):
        answers = [{a for q in w.questions for a in q.golden_answers if not a.isdigit()} for w in (first, second)]
        assert not answers[0] & answers[1]


def _aliases(world):
    if not world.rich:
        return set()
    return {world.entity(kind, number).alias for kind, count in enumerate(world._counts) for number in range(count)}


def test_names_are_unique_and_have_near_duplicates():
    world = make_world(num_entities=5000)
    titles = [passage.title for passage in world.passages]
    assert len(set(map(normalize_answer, titles))) == len(titles) == world.num_entities == 5000
    entity = world.entity(0, 10)
    twin = world.near_duplicate(entity)
    assert entity.name != twin.name
    assert entity.name.split()[0] == twin.name.split()[0]


@pytest.mark.parametrize("num_words", [2, 3])
@pytest.mark.parametrize("split", SPLIT_RESIDUES)
def test_names_are_a_bijection(split, num_words):
    capacity = name_capacity(split, num_words)
    numbers = [*range(3000), *range(capacity - 3000, capacity)]
    assert len({word_tuple(split, "salt", number, num_words) for number in numbers}) == len(numbers)


def test_name_words_are_distinct_beginnings():
    words = name_words()
    assert len({word[:4] for word in words}) == len(words) == 512


def test_same_seed_same_world_other_seed_other_facts():
    first, again, other = make_world(), make_world(), make_world(seed=1)
    assert first.passages == again.passages
    assert first.questions == again.questions
    assert {p.title for p in first.passages} != {p.title for p in other.passages}
    assert not {q.text for q in first.questions} & {q.text for q in other.questions}


def test_question_mix_is_exactly_the_weights():
    questions = make_world(num_entities=2000, num_questions=2000, hops=(1, 2, 1), comparison=0.1).questions
    count = {kind: sum(q.kind == kind for q in questions) for kind in ("1-hop", "2-hop", "3-hop", "comparison")}
    assert count == {"1-hop": 450, "2-hop": 900, "3-hop": 450, "comparison": 200}
    assert len({q.text for q in questions}) == 2000
    assert len({q.id for q in questions}) == 2000


@settings(deadline=None)
@given(st.integers(0, 500), st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_shares_are_as_exact_as_whole_numbers_can_be(num_questions, weights):
    hops = apportion(num_questions, weights)
    assert len(hops) == num_questions
    for hop, weight in enumerate(weights, start=1):
        assert abs(hops.count(hop) - num_questions * weight / sum(weights)) < 1 + 1e-9


def test_who_asks_for_an_alias_finds_its_passage():
    """The corpus is so large that most pairs of words name something, and the retriever knows no word order."""
    world = make_world(num_entities=12_000, style="rich")
    retriever = BM25Retriever(world.passages)
    entities = [world.entity(kind, number) for kind in range(5) for number in range(0, 400, 20)]
    found = retriever.search([entity.alias for entity in entities], 2)
    assert all(e.name in {p.title for p in passages} for e, passages in zip(entities, found, strict=True))


def test_an_answer_is_hard_to_guess():
    """The most frequent answer to a kind of question is rare, so guessing it is no strategy."""
    questions = make_world(num_entities=600, num_questions=1500).questions
    answers = [q.golden_answers[0] for q in questions]
    assert max(map(answers.count, set(answers))) / len(answers) < 0.05
    assert not any(answer in q.text for q, answer in zip(questions, answers, strict=True))


def test_large_worlds_stream_at_constant_memory():
    world = make_world(num_entities=3_000_000, style="rich")
    assert world.num_entities == 3_000_000
    tracemalloc.start()
    passages = list(itertools.islice(world.iter_passages(), 2000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len({p.title for p in passages}) == 2000
    assert len(passages[0].title.split()) == 3
    assert peak < 20e6


def test_impossible_worlds_are_named():
    with pytest.raises(ValueError, match="num_entities"):
        make_world(num_entities=200_000_000)
    with pytest.raises(ValueError, match="ask for fewer"):
        make_world(num_entities=20, num_questions=500, hops=(1,)).chains()
