"""Scores of generated against reference reports: BLEU, METEOR, ROUGE-L, CIDEr, and F1 of findings by the labeler.

Tokens are lower-case words and numbers without punctuation. BLEU's counts, ROUGE-L and CIDEr-D are pycocoevalcap's, the
field's reference, and METEOR's exact and stem stages are NLTK's. The synonym stage needs a download of WordNet and is
left out, and the parameters are those of the first METEOR: it cannot be set beside published METEOR of version 1.5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from place.config import GenerationConfig, UsageError
from place.evaluation.chexbert import CheXbert
from place.evaluation.labeler import COMPETITION, OBSERVATIONS, POSITIVE, build_labeler
from place.evaluation.metrics import Array, Metric, compute_means, draw_weights, summarize
from place.evaluation.radgraph_f1 import RadGraphF1

MAX_ORDER = 4
TOKENS = "lower case, words and numbers, no punctuation"
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d]+(?:['-][^\W\d]+)*")
# The two constants by which pycocoevalcap keeps BLEU defined where nothing matches.
_TINY, _SMALL = 1e-15, 1e-9


class BleuCounts(NamedTuple):
    """What BLEU needs of each report: n-grams that match and all n-grams (B,4), words of both texts (B,)."""

    correct_BN: Array
    total_BN: Array
    generated_B: Array
    reference_B: Array


def tokenize(text: str) -> list[str]:
    """Cut a report into lower-case words and numbers; '2.5' and 'x-ray' stay whole, punctuation goes. Source: ours."""
    return _TOKEN.findall(text.lower())


class Judges(NamedTuple):
    """Models that judge as well, where the user has their weights."""

    chexbert: CheXbert | None = None
    radgraph: RadGraphF1 | None = None


def load_judges(config: GenerationConfig) -> Judges:
    """The judges whose folders are given. Raises UsageError."""
    return Judges(
        CheXbert(config.chexbert) if config.chexbert is not None else None,
        RadGraphF1(config.radgraph) if config.radgraph is not None else None,
    )


def score_reports(
    generated: Sequence[str],
    references: Sequence[str],
    unit_B: Array,
    bootstrap: int,
    seed: int = 0,
    judges: Judges | None = None,
) -> dict[str, Metric]:
    """Judge generated reports, one reference each.

    Args:
        unit_B: patient of each report; patients are resampled.
        bootstrap: resamples; 0 gives no intervals.
    Returns: bleu_1 to bleu_4, meteor, rouge_l (0 to 1), cider (0 to 10), then f1_micro_14, f1_macro_14, f1_micro_5 and
        f1_macro_5, with the judges chexbert_f1_micro_14 and so on and radgraph_simple, radgraph_partial and
        radgraph_complete; the document frequencies of CIDEr are those of all references in every resample.
    Raises:
        UsageError: fewer than two reports, or not as many generated ones as references.
    Source: quoted (pycocoevalcap; NLTK) for the scores; the resampling and the findings are ours.
    """
    if len(generated) != len(references) or len(references) < 2:
        raise UsageError(
            f"{len(generated)} generated and {len(references)} reference reports; give as many of both, two or more"
        )
    texts = [[tokenize(text) for text in side] for side in (generated, references)]
    weight_RB = draw_weights(unit_B, bootstrap, seed).astype(np.float64)
    weight_RB = np.concatenate([np.ones((1, len(references))), weight_RB])
    values = compute_bleu(count_ngrams(*texts), weight_RB)
    per_report = {"meteor": compute_meteor(*texts), "rouge_l": compute_rouge_l(*texts), "cider": compute_cider(*texts)}
    values |= {name: compute_means(value_B, weight_RB) for name, value_B in per_report.items()}
    values |= compute_finding_f1(label_reports(generated), label_reports(references), weight_RB)
    chexbert, radgraph = judges or Judges()
    if chexbert is not None:
        found = compute_finding_f1(chexbert.find_positive(generated), chexbert.find_positive(references), weight_RB)
        values |= {f"chexbert_{name}": value_R for name, value_R in found.items()}
    if radgraph is not None:
        for level, value_B in radgraph.score(generated, references).items():
            values[f"radgraph_{level}"] = compute_means(value_B, weight_RB)
    return {name: summarize(float(value_R[0]), value_R[1:]) for name, value_R in values.items()}


def count_ngrams(generated: Sequence[list[str]], references: Sequence[list[str]]) -> BleuCounts:
    """Clipped n-gram counts of each report. Source: quoted (pycocoevalcap, bleu_scorer.py)."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    cooked = [
        cook_test(" ".join(words), cook_refs([" ".join(reference)]))
        for words, reference in zip(generated, references, strict=True)
    ]
    return BleuCounts(
        np.array([each["correct"] for each in cooked], np.float64),
        np.array([each["guess"] for each in cooked], np.float64),
        np.array([each["testlen"] for each in cooked], np.float64),
        np.array([each["reflen"][0] for each in cooked], np.float64),
    )


def compute_bleu(counts: BleuCounts, weight_RB: Array) -> dict[str, Array]:
    """Corpus BLEU-1 to -4 in each resample, with the brevity penalty. Source: quoted (pycocoevalcap)."""
    precision_RN = (weight_RB @ counts.correct_BN + _TINY) / (weight_RB @ counts.total_BN + _SMALL)
    ratio_R = (weight_RB @ counts.generated_B + _TINY) / (weight_RB @ counts.reference_B + _SMALL)
    penalty_R = np.exp(np.minimum(1 - 1 / ratio_R, 0))
    mean_RN = np.exp(np.log(precision_RN).cumsum(axis=1) / np.arange(1, MAX_ORDER + 1))
    return {f"bleu_{order + 1}": penalty_R * mean_RN[:, order] for order in range(MAX_ORDER)}


class _NoSynonyms:
    """Stands in for WordNet: knows no synonym."""

    @staticmethod
    def synsets(word: str) -> list[str]:
        return []


def compute_meteor(generated: Sequence[list[str]], references: Sequence[list[str]]) -> Array:
    """METEOR (B,) with its exact and stem stages. Source: quoted (NLTK, meteor_score.py)."""
    from nltk.translate.meteor_score import single_meteor_score

    pairs = zip(generated, references, strict=True)
    return np.array([
        single_meteor_score(reference, words, wordnet=_NoSynonyms()) if words and reference else 0.0
        for words, reference in pairs
    ])  # fmt: skip


def compute_rouge_l(generated: Sequence[list[str]], references: Sequence[list[str]]) -> Array:
    """ROUGE-L (B,), F with beta 1.2. Source: quoted (pycocoevalcap, rouge.py)."""
    from pycocoevalcap.rouge.rouge import Rouge

    pairs = zip(generated, references, strict=True)
    return np.array([
        Rouge().calc_score([" ".join(words)], [" ".join(reference)]) if words and reference else 0.0
        for words, reference in pairs
    ])  # fmt: skip


def compute_cider(generated: Sequence[list[str]], references: Sequence[list[str]]) -> Array:
    """CIDEr-D (B,), ten times a cosine. Source: quoted (pycocoevalcap, cider_scorer.py)."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for words, reference in zip(generated, references, strict=True):
        scorer += (" ".join(words), [" ".join(reference)])
    return scorer.compute_score()[1]


def label_reports(reports: Sequence[str]) -> Array:
    """Which of the 14 findings each report has (B,14), by the rule-based labeler; uncertain ones do not count."""
    labeler = build_labeler()
    labels = [labeler.label_report(report) for report in reports]
    return np.array([[label[name] == POSITIVE for name in OBSERVATIONS] for label in labels])


def pack_findings(has_BF: Array) -> Array:
    """The 14 findings of each report as one number (B,), bit f for the f-th of `OBSERVATIONS`."""
    return (has_BF << np.arange(len(OBSERVATIONS))).sum(axis=1).astype(np.uint16)


def unpack_findings(bits_B: Array) -> Array:
    """Which findings each report has (B,14), back from `pack_findings`."""
    return (bits_B[:, None] >> np.arange(len(OBSERVATIONS)) & 1).astype(bool)


def compute_finding_f1(said_BF: Array, true_BF: Array, weight_RB: Array) -> dict[str, Array]:
    """F1 of the findings in each resample: micro and macro, over the 14 and the five of CheXpert's competition.

    Args:
        said_BF, true_BF: whether the generated and the reference report have a finding, as `label_reports` gives it.
    Returns: `f1_micro_14` and so on; the macro mean is over findings that some reference has.
    Source: inferred (R2Gen's successors, CheXbert F1); the macro rule is ours.
    """
    hits_RF, said_RF, true_RF = (weight_RB @ part.astype(np.float64) for part in (said_BF & true_BF, said_BF, true_BF))
    groups = {"14": np.arange(len(OBSERVATIONS)), "5": np.array([OBSERVATIONS.index(name) for name in COMPETITION])}
    found: dict[str, Array] = {}
    for group, columns in groups.items():
        hits, said, true = hits_RF[:, columns], said_RF[:, columns], true_RF[:, columns]
        found[f"f1_micro_{group}"] = 2 * hits.sum(axis=1) / np.maximum(said.sum(axis=1) + true.sum(axis=1), 1)
        known = true > 0
        each = np.where(known, 2 * hits / np.maximum(said + true, 1), 0)
        found[f"f1_macro_{group}"] = each.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return found
