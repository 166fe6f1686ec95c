"""What a machine that runs a bundle is held to: its known answers, and how near it must come to them.

What enters: what the parity gate has of its last row. What leaves: the file that goes into the bundle, and bounds for
its manifest, within which the exporting machine's own graphs are.
"""

import numpy as np

from export.graphs import Precision
from export.parity import BOUNDS, Gate
from qvl_batch.bundle.known_answers import STEPS, KnownAnswers, sample
from qvl_batch.bundle.manifest import Tolerance
from qvl_batch.distances import cosine, relative_error
from qvl_batch.errors import ExportError

#: Integer products are the same on every machine, and what is in fp32 between them differs in its last digits: this is
#: how many times the error of the exporting machine another may have.
SAME = 2.0
#: A token is decided if it leads by so many times the error that logits may have.
LEAD = 3.0


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
        embeds=sample(gate.ours.features),
        logits=gate.reference.first,
        answer=gate.ours.tokens[:STEPS],
        following=scores.argmax(-1),
        is_decided=lead > LEAD * tolerance.logits,
    )
    figures = known.of_vision(gate.ours.features, tolerance)
    figures += known.of_decoder(gate.ours.logits, gate.ours.tokens[:STEPS], tolerance)
    wrong = next((figure for figure in figures if not figure.is_within), None)
    if wrong is not None:
        raise ExportError(f"parity gate: of the known answers, {wrong}; no bundle was written")
    return known


def tolerance_of(gate: Gate, precision: Precision) -> Tolerance:
    """The bounds of the gate, but of integers what this machine found, and some more."""
    exact, vision, decoder = BOUNDS["fp32"], BOUNDS[precision.vision], BOUNDS[precision.decoder]
    features, least, logits = vision.error, vision.feature_cosine, decoder.error
    if precision.vision.startswith("int"):
        found, expected = sample(gate.ours.features), sample(gate.reference.features)
        features = max(exact.error, min(features, SAME * relative_error(found, expected)))
        least = min(exact.feature_cosine, max(least, 1 - SAME * (1 - float(cosine(found, expected).min()))))
    if precision.decoder.startswith("int"):
        logits = max(exact.error, min(logits, SAME * relative_error(gate.ours.logits, gate.reference.first)))
    return Tolerance(features=features, feature_cosine=least, logits=logits)
