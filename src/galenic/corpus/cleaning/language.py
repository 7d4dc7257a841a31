"""Which language a text is in: by script where that settles it, else by py3langid's model (Latin, Cyrillic ...).

py3langid (Lui and Baldwin 2011, "Cross-domain Feature Selection for Language Identification", with newer tables) is a
naive Bayes model over byte n-grams that an automaton finds. Its tables are walked here in compiled code, over the
beginning of each text only; what they say is what py3langid says of that beginning.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from galenic.compiled import compiled
from galenic.corpus.cleaning.counting import SCRIPTS

SAMPLE = 500
"""Bytes at the beginning of a text that are looked at."""
LANGUAGES = (
    "af ar az be bg bn bs ca cs da de el en es et eu fa fi fr ga gu he hi hr hu hy id is it ja ka kk km kn ko ky "
    "lo lt lv mk ml mn mr ms my ne nl no pa pl ps pt ro ru si sk sl sq sr sv sw ta te tg th tl tr uk ur uz vi zh"
).split()
"""Those that are told apart. The model knows more; of those, Latin, pidgins, Galician and Welsh took medical words."""
EVIDENT_WORDS, EVIDENT_SHARE = 6, 0.15
"""A text of Latin letters with so many different ones of `characters.STOP_WORDS`, which make up such a share of its
words, is English without a look at the model. Dutch and Danish have four or five of these words."""
ONE_LANGUAGE = {"hangul": "ko", "thai": "th", "greek": "el", "hebrew": "he"}
"""Scripts that (all but) one language of the web is written in."""
MOSTLY_HAN, HARDLY_HAN = 0.6, 0.05
"""Shares of letters: above the first a text is Chinese, below the second it is not; between, it is both languages.

Short Chinese texts keep Latin letters (units, drug names) and bilingual lists have two to five Latin letters for each
Han character, hence the wide middle.
"""
KANA = 0.1
"""Least share of kana among Han characters and kana in Japanese; Chinese has none."""


class Model(NamedTuple):
    """py3langid's tables as arrays."""

    labels: tuple[str, ...]
    """ISO 639 codes; a language of two scripts is there twice."""
    base: np.ndarray
    """(states,) int64: where a state's 256 successors begin."""
    move: np.ndarray
    """Successors."""
    feature: np.ndarray
    """(states,) int32: the n-gram that ends in a state, or -1."""
    weights: np.ndarray
    """(features, languages) float32: log probabilities."""
    prior: np.ndarray
    """(languages,) float32."""


@functools.cache
def model() -> Model:
    """Loads py3langid's model: half a second, 80 MB."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    found = LanguageIdentifier.from_model_file(MODEL_FILE)
    found.set_languages(LANGUAGES)
    return Model(
        tuple(found.nb_classes),
        np.asarray(found.tk_row, dtype=np.int64) << 8,
        np.asarray(found.tk_nextmove),
        np.asarray(found.tk_output, dtype=np.int32),
        np.ascontiguousarray(found.nb_ptc, dtype=np.float32),
        np.asarray(found.nb_pc, dtype=np.float32),
    )


@compiled
def _classify(
    data: Any,
    starts: Any,
    which: Any,
    sample: int,
    base: Any,
    move: Any,
    feature: Any,
    weights: Any,
    prior: Any,
    out: Any,
) -> None:
    count = np.zeros(len(weights), dtype=np.int32)
    seen = np.empty(sample, dtype=np.int32)
    scores = np.empty(len(prior), dtype=np.float32)
    for i in range(len(which)):
        begin = starts[which[i]]
        end = min(starts[which[i] + 1], begin + sample)
        lower = False
        upper = False
        for p in range(begin, end):
            lower |= 97 <= data[p] <= 122
            upper |= 65 <= data[p] <= 90
        shouted = upper and not lower  # the model knows lower case better
        state = features = 0
        for p in range(begin, end):
            byte = data[p]
            if shouted and 65 <= byte <= 90:
                byte += 32
            state = move[base[state] + byte]
            found = feature[state]
            if found >= 0:
                if count[found] == 0:
                    seen[features] = found
                    features += 1
                count[found] += 1
        scores[:] = prior
        for j in range(features):
            weight = np.float32(np.log1p(np.float32(count[seen[j]])))
            count[seen[j]] = 0
            for k in range(len(scores)):
                scores[k] += weight * weights[seen[j], k]
        out[i] = np.argmax(scores) if features else -1


def classify(data: np.ndarray, starts: np.ndarray, which: np.ndarray, *, sample: int = SAMPLE) -> list[str]:
    """Returns what py3langid says of the first `sample` bytes of some texts; `und` if it knows nothing in them.

    Args:
        data: (bytes,) uint8.
        starts: (n + 1,) int64.
        which: (k,) numbers of texts.
        sample: bytes.
    """
    if not len(which):
        return []
    known = model()
    out = np.empty(len(which), dtype=np.int64)
    _classify(data, starts, np.asarray(which, dtype=np.int64), sample, *known[1:], out)
    return [known.labels[label] if label >= 0 else "und" for label in out]


def identify(
    data: np.ndarray, starts: np.ndarray, measures: np.ndarray, which: np.ndarray | None = None
) -> list[str]:
    """Returns the language of texts.

    Args:
        data: (bytes,) uint8.
        starts: (n + 1,) int64.
        measures: (n,) rows of `measure.MEASURES` of the same texts.
        which: (k,) numbers of the texts asked about; all by default.

    Returns:
        `zh`, `en`, `en-zh` (both), another ISO 639 code, or `und` for texts without letters.
    """
    which = np.arange(len(measures)) if which is None else which
    measures = measures[which]
    letters = np.maximum(measures["letters"], 1)
    share = {name: measures["scripts"][:, i] / letters for i, name in enumerate(SCRIPTS, start=1)}
    out = np.full(len(measures), "", dtype=object)
    out[measures["letters"] == 0] = "und"
    han = share["han"]
    out[han >= HARDLY_HAN] = "en-zh"
    out[han > MOSTLY_HAN] = "zh"
    out[(share["kana"] > 0.05) & (share["kana"] >= KANA * (han + share["kana"]))] = "ja"
    for script, label in ONE_LANGUAGE.items():
        out[share[script] > 0.5] = label
    # Han characters beside something else than English
    out[(out == "en-zh") & (share["latin"] + han < 0.9)] = ""
    evident = (measures["stop_words"] >= EVIDENT_WORDS) & (share["latin"] > 0.9)
    evident &= measures["stop_word_uses"] >= EVIDENT_SHARE * measures["words"]
    out[(out == "") & evident] = "en"
    unknown = np.flatnonzero(out == "")
    out[unknown] = classify(data, starts, which[unknown])
    return out.tolist()
