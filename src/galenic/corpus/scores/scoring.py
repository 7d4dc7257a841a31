"""A trained scorer at work: texts in, calibrated scores and classes out, one compiled pass, the same for any batch."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from galenic.compiled import compiled
from galenic.corpus.scores.features import SHAPES, features
from galenic.corpus.scores.training import Network, logits, spans
from galenic.runtime import UserError, atomic_path, read_json, write_json

FORMAT = 1
"""Of a scorer's folder; features and network belong to it."""
WEIGHTS, FACTS = "scorer.safetensors", "scorer.json"


CHUNK = 512
"""Texts read before the network sees them: their features stay near the processor."""


@compiled
def _calibrated(
    z: np.ndarray,
    places: np.ndarray,
    slopes: np.ndarray,
    temperatures: np.ndarray,
    scores: np.ndarray,
    chosen: np.ndarray,
    probability: np.ndarray,
) -> None:
    """Turns logits into scores, labels and their probabilities, number by number, so that no batch changes a bit."""
    for i in range(len(z)):
        row = z[i]
        for s in range(scores.shape[1]):
            scores[i, s] = 1 / (1 + np.exp(-(slopes[s, 0] * row[s] + slopes[s, 1])))
        for c in range(len(temperatures)):
            best = places[c]
            for k in range(places[c], places[c + 1]):
                if row[k] > row[best]:
                    best = k
            total = 0.0
            for k in range(places[c], places[c + 1]):
                total += np.exp(np.float64(row[k] - row[best]) / temperatures[c])
            chosen[i, c] = best - places[c]
            probability[i, c] = 1 / total


class Scorer:
    """Scores and classes of texts.

    Attributes:
        scores: name -> (slope, shift) of the calibration.
        classes: name -> its labels.
        facts: all that `scorer.json` tells, held-out figures among it.
    """

    def __init__(self, network: Network, facts: dict[str, Any]) -> None:
        self.network, self.facts = network, facts
        self.scores = {name: tuple(head["calibration"]) for name, head in facts["scores"].items()}
        self.classes = {name: tuple(head["labels"]) for name, head in facts["classes"].items()}
        self._slopes = np.array(list(self.scores.values()), dtype=np.float64).reshape(-1, 2)
        self._temperatures = np.array([head["temperature"] for head in facts["classes"].values()], np.float64)
        self._places = spans([len(labels) for labels in self.classes.values()], len(self.scores))

    def __call__(self, texts: Any) -> dict[str, np.ndarray]:
        """Scores a text column.

        Args:
            texts: `pyarrow.LargeStringArray` (or a chunked one) without nulls.

        Returns:
            For each score, float32 (n,) in [0, 1]. For each class, int32 (n,), numbers of `classes[name]`, and under
            `<name>_probability` float32 (n,): of the chosen label, for `medical` of being medical.
        """
        if hasattr(texts, "combine_chunks"):
            texts = texts.combine_chunks()
        n = len(texts)
        scores = np.empty((n, len(self.scores)), np.float32)
        chosen = np.empty((n, len(self.classes)), np.int32)
        probability = np.empty((n, len(self.classes)), np.float32)
        for start in range(0, n, CHUNK):
            rows = slice(start, min(n, start + CHUNK))
            z = logits(self.network, *features(texts[rows.start : rows.stop], int(self.facts["bits"])))
            _calibrated(
                z,
                self._places,
                self._slopes,
                self._temperatures,
                scores[rows],
                chosen[rows],
                probability[rows],
            )
        found: dict[str, np.ndarray] = {name: scores[:, s].copy() for s, name in enumerate(self.scores)}
        for c, name in enumerate(self.classes):
            found[name] = chosen[:, c].copy()
            found[f"{name}_probability"] = probability[:, c].copy()
        if "medical" in self.classes:
            p = found["medical_probability"]
            found["medical_probability"] = np.where(found["medical"] == 1, p, 1 - p)
        return found

    def save(self, folder: str | Path) -> None:
        """Writes `scorer.safetensors` and, last, `scorer.json`."""
        from safetensors.numpy import save

        folder = Path(folder)
        weights = save(dict(self.network._asdict()))
        with atomic_path(folder / WEIGHTS) as temporary:
            temporary.write_bytes(weights)
        # Of two runs into one folder, the second killed between the two files, both would lie there.
        write_json(folder / FACTS, {**self.facts, "weights_sha256": hashlib.sha256(weights).hexdigest()})

    @classmethod
    def load(cls, folder: str | Path) -> "Scorer":
        """Opens a scorer's folder.

        Raises:
            UserError: there is none, or it is damaged, or another version wrote it.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise UserError(f"{folder}: not a scorer's folder (no {FACTS}); run `galenic scorer` first")
        facts = read_json(folder / FACTS)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise UserError(f"{folder / FACTS}: written by another version; train the scorer again")
        try:
            weights = (folder / WEIGHTS).read_bytes()
            if hashlib.sha256(weights).hexdigest() != facts["weights_sha256"]:
                raise ValueError(f"{WEIGHTS} is not the one that {FACTS} names")
            found = load(weights)
            network = Network(*(np.ascontiguousarray(found[name]) for name in Network._fields))
            scorer = cls(network, facts)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: a damaged scorer ({error}); train it again") from None
        shapes = [
            network.vectors.shape[0],
            *network.hidden.shape,
            *network.out.shape,
            *network.out_bias.shape,
        ]
        width, logits = network.hidden.shape[1], int(scorer._places[-1])
        inputs = network.vectors.shape[1] + len(SHAPES)
        if shapes != [2 ** facts["bits"], inputs, width, width, logits, logits] or any(
            weight.dtype != np.float32 for weight in network
        ):
            raise UserError(f"{folder}: {WEIGHTS} and {FACTS} do not belong together; train the scorer again")
        return scorer
