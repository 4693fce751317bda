"""Names: two or three invented words and, for everything but people, a noun of their kind.

A name is a pure function of (split, salt, kind, number), so a world of millions of entities needs no table. The word
numbers of a name add up to its split's residue modulo 4, so names of different splits cannot coincide. Numbers 2m and
2m+1 share all words but the last, so every entity has a near-duplicate as a distractor.
"""

from __future__ import annotations

import functools
import math
import random

# Residues modulo 4 of the sum of a name's word numbers. Pretraining has two, as a base model reads the most worlds.
SPLIT_RESIDUES = {"pretrain": (0, 1), "train": (2,), "eval": (3,)}

NUM_WORDS = 512
_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
_MIDDLES = ("l", "r", "n", "m", "v", "d", "s", "t", "k", "rn", "lm", "nd")
_CODAS = ("", "n", "s", "r", "l", "k", "th", "m")


@functools.cache
def name_words() -> tuple[str, ...]:
    """Return the 512 words that all names are made of: the same in every world, so that no word tells the split."""
    generator = random.Random("searchr1_fast names")
    words: dict[str, None] = {}
    while len(words) < NUM_WORDS:
        word = "".join(generator.choice(part) for part in (_ONSETS, "aeiou", _MIDDLES, "aeiou", _CODAS)).capitalize()
        if all(word[:4] != other[:4] for other in words):  # distinct beginnings: no word is the start of another
            words[word] = None
    return tuple(words)


def name_capacity(split: str, num_words: int) -> int:
    """How many different names of `num_words` words a split has."""
    return NUM_WORDS**num_words // 4 * len(SPLIT_RESIDUES[split])


def word_tuple(split: str, salt: str, number: int, num_words: int) -> tuple[str, ...]:
    """Return the words of name `number` of the family `salt`; different numbers give different tuples."""
    residues = SPLIT_RESIDUES[split]
    pair, member = divmod(number, 2)
    num_pairs = name_capacity(split, num_words) // 2
    assert pair < num_pairs, f"a split has {num_pairs * 2} names of {num_words} words"
    code = _permute(pair, num_pairs, salt)
    # code -> (residue, leading words, pair of last words); the last word completes the residue
    code, residue = code // len(residues), residues[code % len(residues)]
    code, last_pair = divmod(code, NUM_WORDS // 8)
    leading = []
    for _ in range(num_words - 1):
        code, word = divmod(code, NUM_WORDS)
        leading.append(word)
    last = (residue - sum(leading)) % 4 + 4 * (2 * last_pair + member)
    words = name_words()
    return tuple(words[i] for i in (*leading, last))


def _permute(number: int, size: int, salt: str) -> int:
    """Apply a bijection of range(size) chosen by the salt: affine, with a multiplier near the golden section."""
    multiplier, offset = _affine(size, salt)
    return (number * multiplier + offset) % size


@functools.lru_cache(maxsize=256)
def _affine(size: int, salt: str) -> tuple[int, int]:
    generator = random.Random(salt)
    multiplier = int(size * (0.55 + 0.1 * generator.random())) | 1
    while math.gcd(multiplier, size) != 1:
        multiplier += 2
    return multiplier, generator.randrange(size)
