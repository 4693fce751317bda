"""Traces: what they claim to have found is in what they were shown, and the mix is as requested."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_fast.config import WorldConfig
from searchr1_fast.protocol import OBSERVATION_CLOSE, OBSERVATION_OPEN, extract_answer, parse_action
from searchr1_fast.reward import exact_match
from searchr1_fast.types import Action
from searchr1_fast.world import build_world
from searchr1_fast.world.traces import BASE_MIX, INSTRUCT_MIX, PROMPT, STEM_MIX, TraceMix, TraceWriter, documents

ONLY = {name: TraceMix(**{"complete": 0, "first_hop_only": 0, "guess": 0, "wrong_search": 0} | {name: 1})
        for name in ("complete", "first_hop_only", "guess", "wrong_search")}  # fmt: skip


def make_writer(style: str, mix: TraceMix):
    """-> a writer and the chains of its world, including comparisons."""
    settings = {"num_entities": 400, "num_questions": 300, "hops": (1, 1, 1, 1), "comparison": 0.1}
    world = build_world(WorldConfig(split="pretrain", style=style, **settings))
    return TraceWriter(world, mix), world.chains()


@pytest.fixture(scope="module", params=["plain", "rich"])
def style(request):
    return request.param


@pytest.fixture(scope="module")
def complete(style):
    """-> (chain, trace) of complete traces, one per chain."""
    writer, chains = make_writer(style, ONLY["complete"])
    generator = random.Random(0)
    return [(chain, writer.trace(generator, chain)) for chain in chains]


def written(trace) -> list[str]:
    return [text for kind, text in trace if kind == "policy"]


def policy_text(trace) -> str:
    return "\n".join(written(trace))


def test_a_complete_trace_ends_in_the_golden_answer(complete):
    for chain, trace in complete:
        assert exact_match(extract_answer(policy_text(trace)), chain.question.golden_answers) == 1.0


def test_what_a_complete_trace_knows_was_shown_to_it_before(complete):
    """Hop by hop: a fact is in an observation before the turn that uses it, and that turn starts from it."""
    for chain, trace in complete:
        needed = [fact.mention for fact in chain.facts]
        observations: list[str] = []
        known = 0  # facts in the observations so far, in order
        for kind, text in trace:
            if kind == "observation":
                observations.append(text)
                entity = chain.entities[min(known, len(needed) - 1)]
                if f'(Title: "{entity.name}")' in text:
                    assert needed[known] in text
                    known += 1
            elif kind == "policy" and parse_action(text)[0] is Action.ANSWER:
                assert known == len(needed)
            elif kind == "policy" and known and chain.question.kind != "comparison":
                assert needed[known - 1] in text  # the next hop asks for what the last one found
        assert known == len(needed)
        assert trace[0] == ("prompt", PROMPT.format(question=chain.question.text))


def test_a_complete_trace_takes_nothing_from_nowhere(complete):
    """Every name it searches for is in the question or in an earlier observation."""
    for _, trace in complete:
        seen, query = "", "nothing"
        for kind, text in trace:
            if kind != "policy":
                seen += text
                continue
            action, content = parse_action(text)
            if action is Action.SEARCH:
                is_second_try = content.startswith(f"{query} ")  # after a miss: the same name with the relation
                assert content in seen or is_second_try
                query = content


def test_first_hop_only_stops_at_the_first_fact(style):
    writer, chains = make_writer(style, ONLY["first_hop_only"])
    generator = random.Random(1)
    for chain in chains:
        trace = writer.trace(generator, chain)
        answer = extract_answer(policy_text(trace))
        assert answer == chain.facts[0].mention
        assert any(answer in text for kind, text in trace if kind == "observation")
        is_right = exact_match(answer, chain.question.golden_answers) == 1.0
        assert is_right or chain.question.kind != "1-hop"
        if chain.question.kind in ("2-hop", "3-hop", "4-hop"):
            assert not is_right or chain.facts[0].answers == chain.facts[-1].answers


@pytest.mark.parametrize("resolve", [False, True])
def test_whose_an_alias_is_is_said_before_the_fact_where_the_mix_wants_it(resolve):
    mix = replace(ONLY["complete"], resolve_aliases=resolve)
    writer, chains = make_writer("rich", mix)
    generator, num_aliases = random.Random(6), 0
    for chain in chains:
        if chain.question.kind == "comparison":
            continue
        text = policy_text(writer.trace(generator, chain))
        asked = chain.entities[0].name if chain.entities[0].name in chain.question.text else chain.entities[0].alias
        for entity, fact in zip(chain.entities, chain.facts, strict=True):
            is_alias = asked == entity.alias
            resolved = f"{entity.alias} is {entity.name}. The {fact.relation.name} of {entity.name} is {fact.mention}."
            assert (resolved in text) == (resolve and is_alias)
            num_aliases += is_alias
            asked = fact.mention
    assert num_aliases > 50


def test_guesses_do_not_search_and_wrong_searches_do_not_find(style):
    for name, searches in (("guess", 0), ("wrong_search", 1)):
        writer, chains = make_writer(style, ONLY[name])
        generator, num_right = random.Random(2), 0
        for chain in chains:
            trace = writer.trace(generator, chain)
            actions = [parse_action(text)[0] for text in written(trace)]
            assert actions.count(Action.ANSWER) == 1
            assert searches <= actions.count(Action.SEARCH) <= 2 * searches  # twice: a miss, and a second try
            num_right += exact_match(extract_answer(policy_text(trace)), chain.question.golden_answers)
        assert num_right / len(chains) < 0.1


def kind_of(chain, trace) -> str:
    """-> which of the mix's kinds a trace is, by its searches; for chains of two or more hops in a plain world."""
    actions = [parse_action(text) for text in written(trace)]
    queries = [content for action, content in actions if action is Action.SEARCH]
    if not queries:
        return "guess"
    if queries[0] != chain.entities[0].name:
        return "wrong_search"
    return "complete" if len(queries) > 1 else "first_hop_only"


@pytest.mark.parametrize("mix", [BASE_MIX, INSTRUCT_MIX], ids=["base", "instruct"])
def test_the_shares_of_the_mix_come_out(mix):
    """Counted in a plain world, where no search is repeated."""
    writer, chains = make_writer("plain", mix)
    chains = [chain for chain in chains if chain.question.kind in ("2-hop", "3-hop", "4-hop")]
    generator, count = random.Random(3), 4000
    kinds = Counter()
    for _ in range(count):
        chain = generator.choice(chains)
        kinds[kind_of(chain, writer.trace(generator, chain))] += 1
    for name in ONLY:
        share = getattr(mix, name)
        assert kinds[name] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5 + 0.005), kinds


def test_a_mix_adds_up_to_one():
    with pytest.raises(AssertionError, match="add up"):
        TraceMix(0.5, 0.5, 0.5, 0.0)


def test_every_policy_turn_is_one_action_and_every_observation_closed(style):
    """The traces teach the protocol: a turn ends with its closing tag, as a stopped rollout does."""
    writer, chains = make_writer(style, BASE_MIX)
    generator = random.Random(4)
    for chain in chains:
        trace = writer.trace(generator, chain)
        assert trace[0][0] == "prompt"
        assert trace[-1][0] == "policy"
        for place, (kind, text) in enumerate(trace[1:], start=1):
            if kind == "observation":
                assert text.startswith(OBSERVATION_OPEN)
                assert text.endswith(OBSERVATION_CLOSE)
                continue
            action, content = parse_action(text)
            assert content
            assert text.endswith(f"</{action.value}>")
            assert text.startswith("<think>")
            assert (action is Action.SEARCH) == (place < len(trace) - 1)
            assert (action is Action.SEARCH) == (trace[min(place + 1, len(trace) - 1)][0] == "observation")


@pytest.mark.parametrize("mix", [STEM_MIX, replace(STEM_MIX, resolve_aliases=True)], ids=["stem", "resolved"])
def test_reading_exercises_state_what_the_passages_say(style, mix):
    writer, _ = make_writer(style, mix)
    generator = random.Random(5)
    for _ in range(200):
        (kind, observation), *lines = writer.reading(generator)
        assert kind == "prompt"
        assert lines
        for (asks, question), (states, value) in zip(lines[::2], lines[1::2], strict=True):
            assert (asks, states) == ("prompt", "policy")
            subject = question.removesuffix(" is")
            assert subject.partition(" of ")[2] in observation
            if " of " not in subject:  # whose alias it is
                assert f"{value.strip(' .' + chr(10))}, also called {subject}," in observation
            assert value.removesuffix(".\n") in observation
            assert style == "rich" or f"{question}{value}".strip() in observation


def test_searches_are_followed_by_facts_of_what_was_looked_for(style):
    """They are in the first passage found, which may also name what is read next."""
    writer, _ = make_writer(style, BASE_MIX)
    generator, rounds, named, look_alikes = random.Random(5), Counter(), 0, 0
    for _ in range(300):
        document = writer.reading(generator)
        starts = [place for place, (_, text) in enumerate(document) if text.startswith("<search>")]
        rounds[len(starts)] += 1
        before = ""
        for start, end in zip(starts, [*starts[1:], len(document)], strict=True):
            searched = parse_action(document[start][1])[1]
            (kind, observation), opening, *lines, closing = document[start + 1 : end]
            assert (kind, opening, closing) == ("observation", ("prompt", "<think>"), ("prompt", " </think>\n"))
            named += searched in before
            before = observation
            (title, text), *others = (
                passage.split('(Title: "')[1].split('") ') for passage in observation.split("Doc ")[1:]
            )
            look_alikes += bool(others)
            assert all(title.split()[0] == other.split()[0] for other, _ in others)
            values = zip(lines[::2], lines[1::2], strict=True)
            stated = {question.removesuffix(" is").strip(): value for (_, question), (_, value) in values}
            assert {kind for kind, _ in lines[1::2]} == {"policy"}
            if searched != title:
                assert stated.pop(searched) == f" {title}."
                assert f"{title}, also called {searched}," in text
            assert 1 <= len(stated) <= 3
            for subject, value in stated.items():
                assert subject.partition(" of ")[2] == title
                assert value.strip(" .") in text
    assert set(rounds) == {1, 2, 3, 4}
    num_searches = sum(count * number for count, number in rounds.items())
    assert look_alikes / num_searches == pytest.approx(0.3, abs=0.06)
    assert 0.1 < named / num_searches < 0.4


def test_where_a_fact_stands_tells_nothing(style):
    """Excerpts give no relation a fixed place: each is sometimes first, sometimes last, and sometimes missing."""
    writer, _ = make_writer(style, BASE_MIX)
    world, generator = writer.world, random.Random(6)
    entity = world.random_entity(generator)
    facts = [world.fact(entity, relation) for relation in world.relations(entity.kind)]
    orders = set()
    for _ in range(200):
        text = world.excerpt(entity, facts, generator)
        orders.add(tuple(sorted(range(len(facts)), key=lambda i: text.index(facts[i].mention))))
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set(range(len(facts)))
    assert facts[1].mention not in world.excerpt(entity, facts[:1], generator)


def test_recall_asks_for_what_followed_and_not_in_order():
    writer, _ = make_writer("plain", BASE_MIX)
    generator, in_order = random.Random(7), 0
    for _ in range(50):
        (_, listed), *rest = writer.recall(generator)
        words = listed.removeprefix("List: ").removesuffix(".\n").split()
        assert len(set(words)) == len(words)
        starts = []
        for (_, cue), (kind, followed), (_, end) in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
            starts.append(words.index(cue.strip()))
            assert (kind, end) == ("policy", ".\n")
            assert words[starts[-1] + 1 :][: len(followed.split())] == followed.split()
        in_order += starts == sorted(starts)
    assert in_order < 15


def test_steps_name_the_relations_from_the_inside_out(style):
    writer, chains = make_writer(style, BASE_MIX)
    for chain in chains:
        if chain.question.kind == "comparison":
            continue
        (_, question), (_, steps) = writer.steps(random.Random(0), chain)
        places = [steps.index(f"the {fact.relation.name}") for fact in chain.facts[:1]]
        assert places == [steps.index("the ")]
        assert steps.removesuffix(".\n").split(", from ")[1] in question
        assert [part.split("the ")[1] for part in steps.split(", from ")[0].split(", then ")] == [
            fact.relation.name for fact in chain.facts
        ]


@pytest.fixture(scope="module")
def both_writers():
    pairs = [make_writer(style, BASE_MIX) for style in ("plain", "rich")]
    return [writer for writer, _ in pairs], [chains for _, chains in pairs]


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=20))
def test_documents_are_a_pure_function_of_the_seed(both_writers, seed):
    writers, chains = both_writers
    first = documents(writers, chains, [0.5, 0.5], seed, 8)
    again = documents(writers, chains, [0.5, 0.5], seed, 8)
    fresh_writers = [TraceWriter(writer.world, writer.mix) for writer in writers]  # without a cache that could remember
    assert first == again == documents(fresh_writers, chains, [0.5, 0.5], seed, 8)
    assert first != documents(writers, chains, [0.5, 0.5], f"{seed}/other", 8)


def test_documents_come_in_the_shares_and_from_the_writers_asked_for(both_writers):
    writers, chains = both_writers
    count = 3000
    shares = {"reading_share": 0.3, "recall_share": 0.1, "steps_share": 0.2, "article_share": 0.1}
    batch = documents(writers, chains, [0.7, 0.3], "shares", count, **shares)
    shapes = Counter()
    for document in batch:
        if len(document) == 1:
            shapes["article"] += 1
        elif document[0][1].startswith((OBSERVATION_OPEN, "<search>")):
            shapes["reading"] += 1
        elif document[0][1].startswith("List: "):
            shapes["recall"] += 1
        else:
            shapes["steps" if document[1][1].startswith("Steps: ") else "trace"] += 1
    for name, share in {"reading": 0.3, "recall": 0.1, "steps": 0.2, "article": 0.1, "trace": 0.3}.items():
        assert shapes[name] / count == pytest.approx(share, abs=0.04), shapes
    plain_only = documents(writers, chains, [1.0, 0.0], "plain", 300)
    assert not any("also called" in text for document in plain_only for _, text in document)


@pytest.mark.parametrize("object_first", [1.0, 4.0])
def test_sentences_with_the_object_first_are_drawn_as_often_as_asked_for(monkeypatch, object_first):
    """For facts that can be told so; exercises draw as often as their mix says."""
    writer, _ = make_writer("rich", replace(BASE_MIX, object_first=object_first))
    world, asked = writer.world, set()
    generator, drawn, expected = random.Random(3), 0, 0.0
    for entity in (world.entity(0, number) for number in range(200)):
        for fact in (world.fact(entity, relation) for relation in world.relations(entity.kind)):
            first = [sentence for sentence in fact.relation.sentences if sentence.startswith("{o}")]
            others = len(fact.relation.sentences) - len(first)
            text = world.excerpt(entity, [fact], generator, object_first)
            drawn += any(sentence.format(s=entity.name, o=fact.mention) in text for sentence in first)
            expected += object_first * len(first) / (object_first * len(first) + others)
    assert expected > 100
    assert drawn == pytest.approx(expected, rel=0.15)
    excerpt = world.excerpt
    monkeypatch.setattr(world, "excerpt", lambda *arguments: asked.add(arguments[3]) or excerpt(*arguments))
    writer.reading(generator)
    assert asked == {object_first}
