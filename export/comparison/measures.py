"""Measures of one question: one side's trace against the other's.

`reference` is PyTorch or the bundle that is compared against, `candidate` the bundle to compare.
While their tokens are equal, both sides choose the next token for the same row. So their logits can
be compared up to and including the first token that differs, and no further.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from export.comparison.traces import Trace, first_difference, penalised
from qvl_batch.distances import cosine, divergence, relative_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Differences between two traces; errors are largest difference over largest magnitude.

    `first_difference` and the fields about that token are None if all tokens are equal. A margin is the
    score of a side's own token minus that of the other side's token, after the repetition penalty; it is
    None if that side had reached its limit before. Those of vision are None for a row without images.
    """

    equal: bool
    input_equal: bool
    first_difference: int | None
    reference_token: int | None
    answer_token: int | None
    reference_margin: float | None
    answer_margin: float | None
    logits_error: float | None
    token_agreement: float
    edit_similarity: float
    first_token_kl: float
    vision_cosine: float | None
    vision_error: float | None
    prefill_error: float
    decode_error: float | None

    @classmethod
    def of(cls, reference: Trace, candidate: Trace, penalty: float) -> "Measures":
        """Measure `candidate` against `reference`; `penalty` is the repetition penalty of both."""
        first = first_difference(reference.token_ids, candidate.token_ids)
        common = min(len(reference.token_ids), len(candidate.token_ids)) if first is None else first
        comparable = min(common + 1, len(reference.token_ids), len(candidate.token_ids))
        errors = [
            relative_error(found, expected)
            for found, expected in zip(candidate.logits[:comparable], reference.logits[:comparable], strict=True)
        ]
        has_images = bool(reference.features.size)
        longer = max(len(reference.token_ids), len(candidate.token_ids))
        tokens = [_at(trace.token_ids, first) for trace in (reference, candidate)]
        return cls(
            equal=first is None,
            input_equal=reference.input_ids == candidate.input_ids,
            first_difference=first,
            reference_token=tokens[0],
            answer_token=tokens[1],
            reference_margin=_margin(reference, first, tokens[1], penalty),
            answer_margin=_margin(candidate, first, tokens[0], penalty),
            logits_error=errors[first] if first is not None and first < comparable else None,
            token_agreement=common / longer,
            edit_similarity=Levenshtein.normalized_similarity(reference.text, candidate.text),
            first_token_kl=float(divergence(reference.logits[0], candidate.logits[0])),
            vision_cosine=float(cosine(reference.features, candidate.features).mean()) if has_images else None,
            vision_error=relative_error(candidate.features, reference.features) if has_images else None,
            prefill_error=errors[0],
            decode_error=float(np.max(errors[1:])) if len(errors) > 1 else None,
        )


def _margin(trace: Trace, index: int | None, other: int | None, penalty: float) -> float | None:
    """Score of the token at `index` minus that of the token `other`."""
    if index is None or other is None or index >= len(trace.token_ids):
        return None
    seen = {*trace.input_ids, *trace.token_ids[:index]}
    score, others = (
        float(penalised(trace.logits[index][token], penalty if token in seen else 1.0))
        for token in (trace.token_ids[index], other)
    )
    return score - others


def _at(tokens: list[int], index: int | None) -> int | None:
    return tokens[index] if index is not None and index < len(tokens) else None


def measured(measures: Measures | None) -> dict[str, Any]:
    """Measures by name; all None for a row that was not measured."""
    return {name: getattr(measures, name, None) for name in Measures.__slots__}
