"""Answer scores: exact match (the reward), contained match and token F1, equal to the scorers of the published tables.

Exact match and contained match follow Search-R1, which normalises as SQuAD does: lower case, ASCII punctuation deleted,
the articles "a", "an", "the" deleted, white space collapsed. F1 follows HotpotQA. Every score is the best over the
golden answers. What is scored is the answer that `extract_answer` finds in policy text; the prompt is never read.

Left out: the format reward of Search-R1's v0.3 (structure 0.2, final 0.1). Here the outcome alone is rewarded.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from searchr1_fast.protocol import extract_answer

__all__ = ["exact_match", "extract_answer", "f1", "normalize_answer", "sub_exact_match"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation (hyphens join: "well-known" -> "wellknown"), no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


def exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised golden answer, else 0.0; None (no answer) scores 0.0.

    Golden answers such as "The The", "!!!" or "---" normalise to the empty string. The original then rewards every
    prediction that does too, including the empty one, and a policy could learn to exploit this. Here such an answer is
    compared as written, apart from case and white space: "the the" is right, "" and "a" are not. Real outputs score
    the same either way.
    """
    return _best(_equal, prediction, golden_answers)


def sub_exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """1.0 if a normalised golden answer occurs in the normalised prediction, else 0.0; None scores 0.0.

    As in the original, a golden answer that normalises to the empty string occurs in every prediction. The score is a
    figure to report, not a reward.
    """
    return _best(_contains, prediction, golden_answers)


def f1(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """Best F1 of normalised tokens; None scores 0.0.

    "yes", "no" and "noanswer" earn nothing unless equal. A text that normalises to nothing has no tokens and earns 0.0.
    """
    return _best(_token_f1, prediction, golden_answers)


def _best(score: Callable[[str, str], float], prediction: str | None, golden_answers: Sequence[str]) -> float:
    if isinstance(golden_answers, str):
        raise TypeError(f"golden_answers must be a list of answers, not the one string {golden_answers!r}")
    if prediction is None:
        return 0.0
    return max((score(prediction, answer) for answer in golden_answers), default=0.0)


def _equal(prediction: str, answer: str) -> float:
    wanted = normalize_answer(answer)
    if not wanted:
        return float(answer.lower().split() == prediction.lower().split() != [])
    return float(normalize_answer(prediction) == wanted)


def _contains(prediction: str, answer: str) -> float:
    return float(normalize_answer(answer) in normalize_answer(prediction))


def _token_f1(prediction: str, answer: str) -> float:
    given, wanted = normalize_answer(prediction), normalize_answer(answer)
    if given != wanted and (given in _CLOSED_ANSWERS or wanted in _CLOSED_ANSWERS):
        return 0.0
    given_tokens, wanted_tokens = given.split(), wanted.split()
    common = sum((Counter(given_tokens) & Counter(wanted_tokens)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given_tokens), common / len(wanted_tokens)
    return 2 * precision * recall / (precision + recall)
