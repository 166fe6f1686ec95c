"""The known answers of a bundle, and the tolerance that every machine that runs it must keep.

What enters: the parity gate's results for its last row. What leaves: the known-answers file of the bundle, and the
tolerance for its manifest, which the exporting machine's own graphs keep.
"""

import numpy as np

from export.names import TOWERS, Tower
from export.parity import BOUNDS, Gate, bounds_of
from export.precision import Precision
from qvl_batch.bundle.known_answers import STEPS, KnownAnswers, sample
from qvl_batch.bundle.manifest import INTEGERS, Tolerance
from qvl_batch.distances import cosine, relative_error
from qvl_batch.errors import ExportError

#: In integer precision, the error that a machine may have, as a multiple of the exporting machine's. Integer products
#: are the same on every machine; only the fp32 operators between them differ, in the last digits.
INTEGER_MARGIN = 2.0
#: A token is decided if its lead over the second is more than this multiple of the error allowed for logits.
DECIDED_LEAD = 3.0


def known_answers(gate: Gate, tolerance: Tolerance) -> KnownAnswers:
    """PyTorch's answers to the last row of the gate.

    Raises:
        ExportError: the graphs are not within the tolerance.
    """
    scores = gate.reference.scores[:STEPS]
    best = np.sort(scores, axis=-1)
    lead = (best[:, -1] - best[:, -2]) / np.abs(scores).max(axis=-1)
    known = KnownAnswers(
        pixels=gate.row.pixels,
        features=sample(gate.reference.features),
        input_ids=np.array(gate.row.ids),
        embeds=sample(gate.graphs.features),
        logits=gate.reference.first_logits,
        answer=gate.graphs.tokens[:STEPS],
        following=scores.argmax(-1),
        is_decided=lead > DECIDED_LEAD * tolerance.logits,
    )
    figures = known.of_vision(gate.graphs.features, tolerance)
    figures += known.of_decoder(gate.graphs.logits, gate.graphs.tokens[:STEPS], tolerance)
    wrong = next((figure for figure in figures if not figure.is_within), None)
    if wrong is not None:
        raise ExportError(f"parity gate: {wrong} of the known answers; no bundle was written")
    return known


def tolerance_of(gate: Gate, precision: Precision) -> Tolerance:
    """The bounds of the gate; in integer precision, `INTEGER_MARGIN` times this machine's errors if that is less."""
    exact, vision, decoder = BOUNDS["fp32"], *(bounds_of(precision.rounded_to(tower)) for tower in TOWERS)
    features, least_cosine, logits = vision.error, vision.feature_cosine, decoder.error
    if _has_integers(precision, "vision"):
        found, expected = sample(gate.graphs.features), sample(gate.reference.features)
        features = max(exact.error, min(features, INTEGER_MARGIN * relative_error(found, expected)))
        distance = 1 - float(cosine(found, expected).min())
        least_cosine = min(exact.feature_cosine, max(least_cosine, 1 - INTEGER_MARGIN * distance))
    if _has_integers(precision, "decoder"):
        error = relative_error(gate.graphs.logits, gate.reference.first_logits)
        logits = max(exact.error, min(logits, INTEGER_MARGIN * error))
    return Tolerance(features=features, feature_cosine=least_cosine, logits=logits)


def _has_integers(precision: Precision, tower: Tower) -> bool:
    return not precision.rounded_to(tower).isdisjoint(INTEGERS)
