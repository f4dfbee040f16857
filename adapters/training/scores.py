"""How an answer is scored: exact match, token F1, and rank classification over choices."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


def exact_match(answer: str, wanted: str) -> float:
    """1.0 when both are the same text, white space at the ends aside, else 0.0."""
    return float(answer.strip() == wanted.strip())


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over white-space tokens, case ignored, in [0, 1].

    The measure of SQuAD (arXiv 1606.05250) without its removal of articles and punctuation, which
    would score 0 of 0 tokens on tasks that answer in symbols. Two empty texts agree.
    """
    found, gold = (Counter(text.casefold().split()) for text in (answer, wanted))
    if not found or not gold:
        return float(found == gold)
    common = (found & gold).total()
    if common == 0:
        return 0.0
    precision, recall = common / found.total(), common / gold.total()
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True)
class ChoiceScore:
    """Log-likelihood of one choice after the prompt, and over how many tokens it was summed."""

    logprob: float
    tokens: int

    @property
    def normalised(self) -> float:
        """Mean log-likelihood per token, so that long choices are not at a disadvantage."""
        return self.logprob / self.tokens


def best_choice(scores: Sequence[ChoiceScore]) -> int:
    """Index of the choice with the greatest length-normalised log-likelihood; the first of equals.

    Raises `ValueError` on no choices at all.
    """
    return max(range(len(scores)), key=lambda index: scores[index].normalised)


def ranked_right(scores: Sequence[ChoiceScore], wanted: int) -> float:
    """Rank classification of one example: 1.0 when the wanted choice comes out best."""
    return float(best_choice(scores) == wanted)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of nothing, which no real score can be mistaken for."""
    return sum(values) / len(values) if values else float("nan")
