"""Text metrics over all references of a source: sacrebleu's BLEU and chrF, rouge-score's ROUGE."""

from collections.abc import Sequence

from prefix_fast.training.extras import require


def text_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score one prediction per source against all of its references; every figure is in [0, 100].

    ``bleu`` and ``chrf`` are sacrebleu's corpus scores (a source with fewer references than another is scored on those
    it has). ``rouge1``, ``rouge2``, ``rougeL`` are means of F-measures with stemming, the best reference counting.

    Raises:
        ValueError: no prediction, another number of reference lists, or a source without a reference.
        MissingExtraError: sacrebleu or rouge-score is not installed.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"text_metrics: expected as many lists of references as predictions and at least one, got "
            f"{len(predictions)} predictions and {len(references)} lists; pass one list for each prediction"
        )
    for index, texts in enumerate(references):
        if not texts:
            raise ValueError(f"text_metrics: expected a reference for every prediction, got none for number {index}")
    return {**_corpus_scores(predictions, references), **_rouge(predictions, references)}


def _corpus_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    sacrebleu = require("sacrebleu", "text_metrics")
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(predictions), streams).score),
        "chrf": float(sacrebleu.corpus_chrf(list(predictions), streams).score),
    }


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    rouge_scorer = require("rouge_score.rouge_scorer", "text_metrics")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    totals = dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    for prediction, texts in zip(predictions, references, strict=True):
        scores = scorer.score_multi(list(texts), prediction)
        for name in totals:
            totals[name] += scores[name].fmeasure
    return {name: 100 * total / len(predictions) for name, total in totals.items()}
