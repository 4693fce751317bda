"""What a world consists of: kinds of entities, the relations between them, and the words for both."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Relation:
    """A fact `subject -> object`. In sentences `{s}` is the subject's name, `{o}` the object's; `{x}` is any noun."""

    name: str  # the canonical noun: "founder"
    target: str  # kind of the object; "year" for a number
    sentences: tuple[str, ...]  # how a rich passage may state it
    phrases: tuple[str, ...]  # how a rich question may ask for it


@dataclass(frozen=True)
class Kind:
    """A kind of entity. Plain worlds use the first `num_plain` relations, rich worlds all."""

    name: str
    share: float  # of all entities
    suffixes: tuple[str, ...]  # last word of the name; () for people
    epithet: str  # first word of an alias
    relations: tuple[Relation, ...]
    num_plain: int = 3
    fillers: tuple[str, ...] = field(default=())  # sentences that state nothing that is asked


def _relation(name: str, target: str, sentences: str, phrases: str) -> Relation:
    return Relation(name, target, tuple(sentences.split(" | ")), tuple(phrases.split(" | ")))


PERSON = Kind(
    "person",
    0.36,
    (),
    "Grey",
    (
        _relation(
            "birthplace",
            "city",
            "{s} was born in {o}. | {s} came into the world in {o}. | The birthplace of {s} is {o}.",
            "the birthplace of {x} | the place where {x} was born | {x}'s birthplace",
        ),
        _relation(
            "mentor",
            "person",
            "{s} learned the trade from {o}. | The mentor of {s} is {o}. | {o} was the mentor of {s}.",
            "the mentor of {x} | the person who taught {x} | {x}'s mentor",
        ),
        _relation(
            "employer",
            "company",
            "{s} works for {o}. | The employer of {s} is {o}. | {s} is on the payroll of {o}.",
            "the employer of {x} | the company that employs {x} | {x}'s employer",
        ),
        _relation(
            "rival",
            "person",
            "{s} has long quarrelled with {o}. | The rival of {s} is {o}. | {o} is the rival of {s}.",
            "the rival of {x} | the person who competes with {x} | {x}'s rival",
        ),
        _relation(
            "birth year",
            "year",
            "{s} was born in the year {o}. | The birth year of {s} is {o}.",
            "the birth year of {x} | the year in which {x} was born",
        ),
    ),
    fillers=("{s} likes long walks.", "Little is known about the youth of {s}.", "{s} should not be taken for {d}."),
)
CITY = Kind(
    "city",
    0.2,
    ("Bay", "Falls", "Hill", "Ford"),
    "Old",
    (
        _relation(
            "mayor",
            "person",
            "The mayor of {s} is {o}. | {s} is governed by its mayor, {o}. | {o} was elected mayor of {s}.",
            "the mayor of {x} | the person who runs {x} | {x}'s mayor",
        ),
        _relation(
            "region",
            "region",
            "{s} lies in {o}. | The region of {s} is {o}. | {s} belongs to {o}.",
            "the region of {x} | the region in which {x} lies | {x}'s region",
        ),
        _relation(
            "twin town",
            "city",
            "{s} is twinned with {o}. | The twin town of {s} is {o}. | {s} and {o} are twin towns.",
            "the twin town of {x} | the town twinned with {x} | {x}'s twin town",
        ),
        _relation(
            "founding year",
            "year",
            "{s} was founded in {o}. | The founding year of {s} is {o}.",
            "the founding year of {x} | the year in which {x} was founded",
        ),
    ),
    num_plain=2,
    fillers=("{s} is known for its market.", "The winters in {s} are mild.", "Travellers confuse {s} with {d}."),
)
COMPANY = Kind(
    "company",
    0.18,
    ("Works", "Mills", "Lines", "Press"),
    "Great",
    (
        _relation(
            "founder",
            "person",
            "{s} was founded by {o}. | The founder of {s} is {o}. | {o} set up {s}.",
            "the founder of {x} | the person who founded {x} | {x}'s founder",
        ),
        _relation(
            "headquarters",
            "city",
            "{s} is based in {o}. | The headquarters of {s} is in {o}. | {s} has its offices in {o}.",
            "the headquarters of {x} | the city where {x} is based | {x}'s headquarters",
        ),
        _relation(
            "director",
            "person",
            "{s} is led by {o}. | The director of {s} is {o}. | {o} is the director of {s}.",
            "the director of {x} | the person who leads {x} | {x}'s director",
        ),
        _relation(
            "founding year",
            "year",
            "{s} opened in {o}. | The founding year of {s} is {o}.",
            "the founding year of {x} | the year in which {x} opened",
        ),
    ),
    num_plain=2,
    fillers=("{s} pays its workers well.", "The products of {s} are widely sold.", "{s} is no part of {d}."),
)
BOOK = Kind(
    "book",
    0.18,
    ("Saga", "Song", "Letters", "Chronicle"),
    "Lost",
    (
        _relation(
            "author",
            "person",
            "{s} was written by {o}. | The author of {s} is {o}. | {o} wrote {s}.",
            "the author of {x} | the person who wrote {x} | {x}'s author",
        ),
        _relation(
            "publisher",
            "company",
            "{s} was published by {o}. | The publisher of {s} is {o}. | {o} brought out {s}.",
            "the publisher of {x} | the company that brought out {x} | {x}'s publisher",
        ),
        _relation(
            "setting",
            "city",
            "{s} is set in {o}. | The setting of {s} is {o}. | The story of {s} takes place in {o}.",
            "the setting of {x} | the place where {x} is set | {x}'s setting",
        ),
        _relation(
            "publication year",
            "year",
            "{s} came out in {o}. | The publication year of {s} is {o}.",
            "the publication year of {x} | the year in which {x} came out",
        ),
    ),
    num_plain=2,
    fillers=("{s} was read in schools.", "Critics were kind to {s}.", "{s} has nothing to do with {d}."),
)
REGION = Kind(
    "region",
    0.08,
    ("Province", "Valley", "Coast", "Isles"),
    "Far",
    (
        _relation(
            "capital",
            "city",
            "The capital of {s} is {o}. | {s} is ruled from {o}. | {o} is the capital of {s}.",
            "the capital of {x} | the city from which {x} is ruled | {x}'s capital",
        ),
        _relation(
            "governor",
            "person",
            "The governor of {s} is {o}. | {s} answers to its governor, {o}. | {o} governs {s}.",
            "the governor of {x} | the person who governs {x} | {x}'s governor",
        ),
        _relation(
            "neighbour",
            "region",
            "{s} borders on {o}. | The neighbour of {s} is {o}. | Next to {s} lies {o}.",
            "the neighbour of {x} | the region next to {x} | {x}'s neighbour",
        ),
    ),
    num_plain=2,
    fillers=("{s} is thinly peopled.", "The roads of {s} are good.", "{s} is not the same as {d}."),
)

KINDS = (PERSON, CITY, COMPANY, BOOK, REGION)
KIND_NAMES = tuple(kind.name for kind in KINDS)

# How a rich passage repeats its subject's other name; {a} is the alias.
ALIAS_SENTENCES = (
    "To many, {s} is {a}.",
    "Older papers speak of {s} as {a}.",
    "{a} is but another name for {s}.",
)
