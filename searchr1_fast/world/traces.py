"""Text for pre-training the tiny base model: traces good and bad, exercises in reading and in questions, articles.

A base model has seen much text about everything and few good examples of the task at hand. The mix imitates that: a
`TraceMix` says which share of the traces is complete; the others stop after the first search, guess, or search for
something else. The exercises teach reading a question and a passage, never chaining searches.

A document is a list of segments `(kind, text)`; only "policy" segments are learned.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from searchr1_fast.protocol import format_observation
from searchr1_fast.types import Passage
from searchr1_fast.world.names import name_words
from searchr1_fast.world.world import Chain, Entity, Fact, World

Document = list[tuple[str, str]]

PROMPT = "Question: {question}\n"


@dataclass(frozen=True)
class TraceMix:
    """Shares of the kinds of traces, which add up to 1, and how they go about an alias."""

    complete: float
    first_hop_only: float
    guess: float
    wrong_search: float
    resolve_aliases: bool = False
    """State whose alias it is first, then look the fact up under the name: two small steps instead of one that a small
    model hardly manages."""
    as_found: bool = False
    """Show passages as a good retriever finds them, the right one first, and give reading exercises as a sequence of
    searches. Where the right passage may be anywhere, a model of this size has to recognise it by the name, and does
    not learn to: of two passages of look-alikes it took either (the stem, after 4,000 steps: right 51 of 100 times)."""
    object_first: float = 1.0
    """How many times as often as others exercises draw sentences that begin with their object ("Pekok Grame is the
    rival of …"). Such sentences are few: a model that met them no more often read .71 of them and .94 of the others."""

    def __post_init__(self) -> None:
        total = self.complete + self.first_hop_only + self.guess + self.wrong_search
        assert abs(total - 1) < 1e-9, f"shares add up to {total}"


STEM_MIX = TraceMix(complete=0.25, first_hop_only=0.45, guess=0.15, wrong_search=0.15)
READER_MIX = replace(STEM_MIX, resolve_aliases=True, as_found=True)
BASE_MIX = replace(READER_MIX, object_first=4.0)
INSTRUCT_MIX = replace(BASE_MIX, complete=0.60, first_hop_only=0.30, guess=0.05, wrong_search=0.05)


class TraceWriter:
    """Writes documents about one world."""

    def __init__(self, world: World, mix: TraceMix) -> None:
        self.world, self.mix = world, mix
        self._describe = functools.lru_cache(maxsize=100_000)(lambda entity: world.describe(entity))

    # ---------------------------------------------------------------- traces

    def trace(self, generator: random.Random, chain: Chain) -> Document:
        """Write one attempt at the chain's question, of a kind drawn from the mix."""
        kinds = (self._complete, self._first_hop_only, self._guess, self._wrong_search)
        weights = (self.mix.complete, self.mix.first_hop_only, self.mix.guess, self.mix.wrong_search)
        write = generator.choices(kinds, weights)[0]
        return [("prompt", PROMPT.format(question=chain.question.text)), *write(generator, chain)]

    def _complete(self, generator: random.Random, chain: Chain) -> Document:
        if chain.question.kind == "comparison":
            return self._complete_comparison(generator, chain)
        document: Document = []
        known = ""
        name = _asked_name(chain)
        for entity, fact in zip(chain.entities, chain.facts, strict=True):
            thought = f"{known}I need the {fact.relation.name} of {name}."
            document += self._search(generator, thought, name, fact.relation.name, entity)
            known, name = f"{self._found(entity, fact, name)} ", fact.mention
        return [*document, ("policy", _answer(known.rstrip(), name))]

    def _found(self, entity: Entity, fact: Fact, name: str) -> str:
        """Say what the passage said about the entity, which was searched for as `name`."""
        if self.mix.resolve_aliases and name != entity.name:
            return f"{name} is {entity.name}. The {fact.relation.name} of {entity.name} is {fact.mention}."
        return f"The {fact.relation.name} of {name} is {fact.mention}."

    def _complete_comparison(self, generator: random.Random, chain: Chain) -> Document:
        first, second = chain.entities
        relation = chain.facts[0].relation.name
        years = [fact.mention for fact in chain.facts]
        document = self._search(generator, f"I need the {relation} of {first.name}.", first.name, relation, first)
        thought = f"The {relation} of {first.name} is {years[0]}. I need the {relation} of {second.name}."
        document += self._search(generator, thought, second.name, relation, second)
        thought = f"The {relation} of {second.name} is {years[1]}. {min(years)} is earlier than {max(years)}."
        return [*document, ("policy", _answer(thought, chain.question.golden_answers[0]))]

    def _first_hop_only(self, generator: random.Random, chain: Chain) -> Document:
        entity, fact = chain.entities[0], chain.facts[0]
        name = entity.name if chain.question.kind == "comparison" else _asked_name(chain)
        relation = fact.relation.name
        document = self._search(generator, f"I need the {relation} of {name}.", name, relation, entity)
        return [*document, ("policy", _answer(self._found(entity, fact, name), fact.mention))]

    def _guess(self, generator: random.Random, chain: Chain) -> Document:
        thought = generator.choice(("I know this.", "I have read about this.", "That is well known."))
        return [("policy", _answer(thought, self.world.random_entity(generator).name))]

    def _wrong_search(self, generator: random.Random, chain: Chain) -> Document:
        wrong = self.world.random_entity(generator)
        relation = chain.facts[-1].relation.name
        found = self.world.fact(wrong, generator.choice(self.world.relations(wrong.kind)))
        return [
            *self._search(generator, f"I look for the {relation}.", wrong.name, relation, wrong),
            ("policy", _answer(f"The {found.relation.name} of {wrong.name} is {found.mention}.", found.mention)),
        ]

    def _search(self, generator: random.Random, thought: str, name: str, relation: str, entity: Entity) -> Document:
        """Write a search turn with its observation; in rich worlds sometimes a miss and a second try in other words."""
        document = [("policy", f"<think> {thought} </think>\n<search> {name} </search>")]
        if self.world.rich and generator.random() < 0.08:
            document.append(("observation", self._observe(generator, None)))
            again = f"<think> {name} is not there. I search again. </think>\n<search> {name} {relation} </search>"
            document.append(("policy", again))
        document.append(("observation", self._observe(generator, entity, generator.choice((1, 2, 2, 3)))))
        return document

    def _observe(self, generator: random.Random, entity: Entity | None, num_passages: int = 2) -> str:
        """Write what a lexical retriever would find: the entity's passage, mostly first, and look-alikes or others."""
        if entity is None:
            found = [self.world.random_entity(generator) for _ in range(num_passages)]
        else:
            others = [self.world.near_duplicate(entity), self.world.random_entity(generator)]
            found = [entity, *others[: num_passages - 1]]
            if not self.mix.as_found and generator.random() < 0.25:
                generator.shuffle(found)
        return format_observation([Passage("", e.name, self._describe(e)) for e in found])

    # ---------------------------------------------------------------- exercises

    def reading(self, generator: random.Random) -> Document:
        """Write one of the two exercises in reading."""
        return self._searches(generator) if self.mix.as_found else self._questions(generator)

    def _searches(self, generator: random.Random) -> Document:
        """Write one to four searches, each with what it finds and some facts about the entity searched for.

        The next entity to search for is given, never learned: half of the time it is one that the last passage named.
        """
        document: Document = []
        entity = self.world.random_entity(generator)
        name = entity.alias if entity.alias and generator.random() < 0.25 else entity.name
        for _ in range(generator.randint(1, 4)):
            facts = self._some_facts(generator, entity)
            document.append(("prompt", f"<search> {name} </search>"))
            document.append(("observation", self._excerpts(generator, entity, facts)))
            document.append(("prompt", "<think>"))
            if name != entity.name:
                document += [("prompt", f" {name} is"), ("policy", f" {entity.name}.")]
            asked = generator.sample(facts, min(3, len(facts)))
            for fact in asked:
                document.append(("prompt", f" The {fact.relation.name} of {entity.name} is"))
                document.append(("policy", f" {fact.mention}."))
            document.append(("prompt", " </think>\n"))
            entity = self.world.random_entity(generator)
            name = entity.name
            named = [fact for fact in asked if fact.target is not None]
            if named and generator.random() < 0.5:
                entity, name = self.world.entity(*named[-1].target), named[-1].mention
        return document

    def _excerpts(self, generator: random.Random, entity: Entity, facts: Sequence[Fact]) -> str:
        """Write what a search finds: these facts of the entity first, then perhaps some of its near-duplicate."""
        told = [(entity, facts)]
        if generator.random() < 0.3:
            other = self.world.near_duplicate(entity)
            told.append((other, self._some_facts(generator, other)))
        return format_observation(
            [
                Passage("", e.name, self.world.excerpt(e, told_of, generator, self.mix.object_first))
                for e, told_of in told
            ]
        )

    def _some_facts(self, generator: random.Random, entity: Entity) -> list[Fact]:
        """Draw some of an entity's facts, half of the time all, in any order."""
        facts = [self.world.fact(entity, relation) for relation in self.world.relations(entity.kind)]
        return generator.sample(facts, generator.choice((len(facts), generator.randint(1, len(facts)))))

    def _questions(self, generator: random.Random) -> Document:
        """Write excerpts of one to three passages, mostly two of them alike, then their facts in one form of words.

        Only the facts are learned, not which of them is asked for next: that is chance, and would be noise in the
        gradient.
        """
        world = self.world
        entities = [world.random_entity(generator)]
        if generator.random() < 0.7:
            entities.append(world.near_duplicate(entities[0]))
        if generator.random() < 0.3:
            entities.append(world.random_entity(generator))
        generator.shuffle(entities)
        told: list[tuple[Entity, list[Fact]]] = []
        for entity in entities:
            facts = [world.fact(entity, relation) for relation in world.relations(entity.kind)]
            told.append((entity, generator.sample(facts, generator.randint(1, len(facts)))))
        passages = [Passage("", entity.name, world.excerpt(entity, facts, generator)) for entity, facts in told]
        document = [("prompt", format_observation(passages))]
        pairs = [(entity, fact) for entity, facts in told for fact in facts]
        for entity, fact in generator.sample(pairs, min(8, len(pairs))):
            name = entity.alias if entity.alias and generator.random() < 0.3 else entity.name
            if self.mix.resolve_aliases and name != entity.name:
                document += [("prompt", f"{name} is"), ("policy", f" {entity.name}.\n")]
                name = entity.name
            document.append(("prompt", f"The {fact.relation.name} of {name} is"))
            document.append(("policy", f" {fact.mention}.\n"))
        return document

    def recall(self, generator: random.Random) -> Document:
        """Write a list of words, then many times one of them and what followed it, from anywhere in the list.

        Only looking for the word helps. Repeating the whole list would not teach that: it can be copied by counting.
        """
        words = generator.sample(name_words(), generator.randint(6, 48))
        document = [("prompt", f"List: {' '.join(words)}.\n")]
        for _ in range(max(4, len(words) // 2)):
            length = generator.choice((2, 2, 2, 3, 4))
            start = generator.randrange(len(words) - length + 1)
            followed = " ".join(words[start + 1 : start + length])
            document += [("prompt", f" {words[start]}"), ("policy", f" {followed}"), ("prompt", ".\n")]
        return document

    def steps(self, generator: random.Random, chain: Chain) -> Document:
        """Write a question, and the facts it goes through from the inside out."""
        names = ", then the ".join(fact.relation.name for fact in chain.facts)  # of a comparison: the same twice
        steps = f"Steps: the {names}, from {_asked_name(chain)}.\n"
        return [("prompt", PROMPT.format(question=chain.question.text)), ("policy", steps)]

    def article(self, generator: random.Random) -> Document:
        """Write a passage as plain text."""
        return [("policy", self._describe(self.world.random_entity(generator)) + "\n")]


def _asked_name(chain: Chain) -> str:
    """Return the name in the question: the first entity's, or its alias if the question uses that."""
    entity = chain.entities[0]
    return entity.name if entity.name in chain.question.text else entity.alias


def _answer(thought: str, answer: str) -> str:
    return f"<think> {thought} </think>\n<answer> {answer} </answer>"


def documents(
    writers: Sequence[TraceWriter],
    chains: Sequence[Sequence[Chain]],  # per writer
    weights: Sequence[float],  # per writer
    seed: str,
    num_documents: int,
    reading_share: float = 0.15,
    recall_share: float = 0.1,
    steps_share: float = 0.15,
    article_share: float = 0.02,
) -> list[Document]:
    """Write a batch of documents, a pure function of the seed: exercises in the given shares, the rest traces."""
    generator = random.Random(seed)
    batch = []
    for _ in range(num_documents):
        writer, own_chains = generator.choices(list(zip(writers, chains, strict=True)), weights)[0]
        draw = generator.random()
        if draw < reading_share:
            batch.append(writer.reading(generator))
        elif draw < reading_share + recall_share:
            batch.append(writer.recall(generator))
        elif draw < reading_share + recall_share + steps_share:
            batch.append(writer.steps(generator, generator.choice(own_chains)))
        elif draw < reading_share + recall_share + steps_share + article_share:
            batch.append(writer.article(generator))
        else:
            batch.append(writer.trace(generator, generator.choice(own_chains)))
    return batch
