"""A generated encyclopedia: entities, facts, one passage each, and questions of one to many hops.

Everything is a pure function of the configuration and an entity's number; nothing is stored. A world of a few hundred
entities is a list in memory; one of millions is streamed to JSONL at a constant memory cost. A model that does not
search cannot answer: facts are hashes, and names of different splits never coincide (names.py).
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from searchr1_fast.config import WorldConfig
from searchr1_fast.types import Passage, Question
from searchr1_fast.world.names import name_capacity, word_tuple
from searchr1_fast.world.schema import ALIAS_SENTENCES, KIND_NAMES, KINDS, Kind, Relation

_FIRST_YEAR, _NUM_YEARS = 1500, 500

# All names are made of the same words, and in a large world nearly every order of two words names something. So to a
# lexical retriever an alias of two words is another entity's name (100,000 entities: found in the best five for none of
# 233). With three words, said twice in its own passage, it is found.
_ALIAS_WORDS = 3


@dataclass(frozen=True)
class Entity:
    """One entry. `number` counts within the kind."""

    kind: Kind
    number: int
    name: str
    alias: str  # "" in plain worlds


@dataclass(frozen=True)
class Fact:
    """What a relation says about an entity. `mention` is the object as the passage writes it: its name or its alias."""

    relation: Relation
    answers: tuple[str, ...]  # name and alias of the object, or the year
    mention: str
    target: tuple[int, int] | None  # (kind, number) of the object; None for a year


@dataclass(frozen=True)
class Chain:
    """A compositional question with the way to its answer: hop i asks `facts[i].relation` of `entities[i]`."""

    question: Question
    entities: tuple[Entity, ...]
    facts: tuple[Fact, ...]


class World:
    """The encyclopedia of one `WorldConfig`."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.rich = config.style == "rich"
        self._counts = [max(2, round(kind.share * config.num_entities)) for kind in KINDS]
        self._counts[0] = max(2, config.num_entities - sum(self._counts[1:]))
        largest = max(self._counts)
        self._num_words = 2 if largest <= name_capacity(config.split, 2) else 3
        if largest > name_capacity(config.split, 3):
            raise ValueError(
                f"world.num_entities: {config.num_entities} is more than the names of split {config.split!r}"
            )
        self._salt = f"{config.split}/{config.seed}"

    # ---------------------------------------------------------------- entities and facts

    @property
    def num_entities(self) -> int:
        """The number of entities, each of which has one passage."""
        return sum(self._counts)

    def entity(self, kind_index: int, number: int) -> Entity:
        """Make entry `number` of a kind."""
        kind = KINDS[kind_index]
        words = word_tuple(self.config.split, f"{self._salt}/{kind.name}", number, self._num_words)
        suffix = (
            (kind.suffixes[self._hash("suffix", kind.name, number // 2) % len(kind.suffixes)],) if kind.suffixes else ()
        )
        alias = ""
        if self.rich:
            alias_words = word_tuple(self.config.split, f"{self._salt}/{kind.name}/alias", number, _ALIAS_WORDS)
            alias = " ".join((kind.epithet, *alias_words))
        return Entity(kind, number, " ".join((*words, *suffix)), alias)

    def relations(self, kind: Kind) -> tuple[Relation, ...]:
        """The relations that passages of this world state."""
        return kind.relations if self.rich else kind.relations[: kind.num_plain] + kind.relations[-1:]

    def fact(self, entity: Entity, relation: Relation) -> Fact:
        """Return what a relation says about an entity in this world. Its object is never the entity itself."""
        value = self._hash("fact", entity.kind.name, entity.number, relation.name)
        if relation.target == "year":
            year = str(_FIRST_YEAR + value % _NUM_YEARS)
            return Fact(relation, (year,), year, None)
        kind_index = KIND_NAMES.index(relation.target)
        number = value % self._counts[kind_index]
        if KINDS[kind_index] is entity.kind and number == entity.number:
            number = (number + 1) % self._counts[kind_index]
        target = self.entity(kind_index, number)
        names = (target.name, target.alias) if target.alias else (target.name,)
        by_alias = self.rich and self._hash("mention", entity.kind.name, entity.number, relation.name) % 4 == 0
        return Fact(relation, names, names[1] if by_alias else names[0], (kind_index, number))

    def near_duplicate(self, entity: Entity) -> Entity:
        """Return the entity whose name differs only in the last word. The last of an odd-sized kind has none, and gets
        the first of its kind."""
        kind_index = KINDS.index(entity.kind)
        other = entity.number ^ 1
        return self.entity(kind_index, other if other < self._counts[kind_index] else 0)

    def random_entity(self, generator: random.Random) -> Entity:
        """Draw an entry uniformly."""
        kind_index = generator.choices(range(len(KINDS)), self._counts)[0]
        return self.entity(kind_index, generator.randrange(self._counts[kind_index]))

    # ---------------------------------------------------------------- passages

    def iter_passages(self) -> Iterator[Passage]:
        """Yield all passages, in a fixed order, with ids "0", "1", …"""
        row = itertools.count()
        for kind_index, count in enumerate(self._counts):
            for number in range(count):
                entity = self.entity(kind_index, number)
                yield Passage(str(next(row)), entity.name, self.describe(entity))

    @property
    def corpus_key(self) -> tuple[str, int, int, str]:
        """What determines the passages: worlds with the same key differ only in their questions."""
        return self.config.split, self.config.seed, self.config.num_entities, self.config.style

    @cached_property
    def passages(self) -> list[Passage]:
        """All passages in memory."""
        return list(self.iter_passages())

    def describe(self, entity: Entity) -> str:
        """The text of the entity's passage."""
        facts = [self.fact(entity, relation) for relation in self.relations(entity.kind)]
        if not self.rich:
            return " ".join(_plain_sentence(entity, fact) for fact in facts)
        generator = random.Random(self._hash("text", entity.kind.name, entity.number))
        sentences = [_rich_sentence(entity, fact, generator) for fact in facts]
        sentences += [self._filler(entity, generator), _also_called(entity, generator)]
        generator.shuffle(sentences)
        return " ".join((_opening(entity), *sentences))

    def excerpt(
        self, entity: Entity, facts: Sequence[Fact], generator: random.Random, object_first: float = 1.0
    ) -> str:
        """Write a passage as `describe` might have: only these facts, in any order, in words drawn anew.

        It is for exercises. In a plain world facts always stand in the same places, and a model that has read nothing
        else finds them by counting: two passages that begin alike, or one fact more, and it is lost. Sentences that
        begin with their object are drawn `object_first` times as often as others.
        """
        if not self.rich:
            sentences = [_plain_sentence(entity, fact) for fact in facts]
        else:
            sentences = [_rich_sentence(entity, fact, generator, object_first) for fact in facts]
            if generator.random() < 0.6:
                sentences.append(self._filler(entity, generator))
            if generator.random() < 0.6:
                sentences.append(_also_called(entity, generator))
        generator.shuffle(sentences)
        return " ".join((_opening(entity), *sentences) if self.rich else sentences)

    def _filler(self, entity: Entity, generator: random.Random) -> str:
        """Choose a sentence that answers nothing, and may name the near-duplicate."""
        return generator.choice(entity.kind.fillers).format(s=entity.name, d=self.near_duplicate(entity).name)

    # ---------------------------------------------------------------- questions

    @cached_property
    def questions(self) -> list[Question]:
        """`num_questions` different questions, hops and comparisons mixed as configured."""
        return [chain.question for chain in self.chains()]

    def chains(self) -> list[Chain]:
        """Make the questions, with the way to their answers."""
        generator = random.Random(f"{self._salt}/questions")
        num_comparison = round(self.config.num_questions * self.config.comparison)
        hops = [0] * num_comparison + apportion(self.config.num_questions - num_comparison, self.config.hops)
        chains: dict[str, Chain] = {}
        for number in range(self.config.num_questions):
            for _attempt in range(200):
                if hops[number] == 0:
                    chain = self._comparison(generator, f"c{number}")
                else:
                    chain = self._compositional(generator, hops[number], f"q{number}")
                if chain is not None and chain.question.text not in chains:
                    chains[chain.question.text] = chain
                    break
            else:
                raise ValueError(
                    f"world.num_questions: {self.config.num_entities} entities do not give "
                    f"{self.config.num_questions} different questions; ask for fewer"
                )
        ordered = list(chains.values())
        generator.shuffle(ordered)
        return ordered

    def _compositional(self, generator: random.Random, hops: int, question_id: str) -> Chain | None:
        entity = self.random_entity(generator)
        entities, facts = [entity], []
        for hop in range(hops):
            relations = self.relations(entities[-1].kind)
            if hop < hops - 1:  # a year leads nowhere
                relations = tuple(relation for relation in relations if relation.target != "year")
            fact = self.fact(entities[-1], generator.choice(relations))
            facts.append(fact)
            if fact.target is not None:
                entities.append(self.entity(*fact.target))
        if len({entity.name for entity in entities}) < len(entities):
            return None  # a question that comes back to where it started answers itself
        phrase = entity.name if not self.rich or generator.random() < 0.75 else entity.alias
        for hop, fact in enumerate(facts):
            phrase = self._ask(generator, fact.relation, innermost=hop == 0).format(x=phrase)
        opening = "Who is" if facts[-1].relation.target == "person" else "What is"
        question = Question(question_id, f"{opening} {phrase}?", facts[-1].answers, self.source, f"{hops}-hop")
        return Chain(question, tuple(entities[:hops]), tuple(facts))

    def _ask(self, generator: random.Random, relation: Relation, innermost: bool) -> str:
        """Choose a noun phrase for the relation; a possessive only on a name, as on more it could be read two ways."""
        if not self.rich:
            return f"the {relation.name} of {{x}}"
        return generator.choice([phrase for phrase in relation.phrases if innermost or "{x}'s" not in phrase])

    def _comparison(self, generator: random.Random, question_id: str) -> Chain | None:
        kind_index = generator.choice([i for i, kind in enumerate(KINDS) if kind.relations[-1].target == "year"])
        first, second = (self.entity(kind_index, n) for n in generator.sample(range(self._counts[kind_index]), 2))
        relation = first.kind.relations[-1]
        facts = (self.fact(first, relation), self.fact(second, relation))
        if facts[0].mention == facts[1].mention:
            return None
        earlier = first if int(facts[0].mention) < int(facts[1].mention) else second
        answers = (earlier.name, earlier.alias) if earlier.alias else (earlier.name,)
        text = f"Which has the earlier {relation.name}, {first.name} or {second.name}?"
        return Chain(Question(question_id, text, answers, self.source, "comparison"), (first, second), facts)

    @property
    def source(self) -> str:
        """What questions of this world name as their source."""
        return f"world-{self.config.style}"

    # ---------------------------------------------------------------- hashing

    def _hash(self, *key: object) -> int:
        text = "/".join((self._salt, *map(str, key)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def build_world(config: WorldConfig) -> World:
    """Make the world of a configuration. ValueError if it asks for more than there is."""
    return World(config)


def apportion(num_questions: int, weights: Sequence[float]) -> list[int]:
    """Return each question's number of hops, ascending, in shares as exact as integers can be (largest remainders)."""
    exact = [num_questions * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: num_questions - sum(counts)]:
        counts[i] += 1
    return [hops for hops, count in enumerate(counts, start=1) for _ in range(count)]


def _plain_sentence(entity: Entity, fact: Fact) -> str:
    return f"The {fact.relation.name} of {entity.name} is {fact.mention}."


def _rich_sentence(entity: Entity, fact: Fact, generator: random.Random, object_first: float = 1.0) -> str:
    sentences = fact.relation.sentences
    if object_first == 1.0:  # `choices` draws differently from `choice`, and worlds must not change
        sentence = generator.choice(sentences)
    else:
        weights = [object_first if sentence.startswith("{o}") else 1.0 for sentence in sentences]
        sentence = generator.choices(sentences, weights)[0]
    return sentence.format(s=entity.name, o=fact.mention)


def _also_called(entity: Entity, generator: random.Random) -> str:
    return generator.choice(ALIAS_SENTENCES).format(s=entity.name, a=entity.alias)


def _opening(entity: Entity) -> str:
    return f"{entity.name}, also called {entity.alias}, is a {entity.kind.name}."
