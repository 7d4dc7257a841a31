"""Cleaning: light repair, boilerplate lines out, rules that drop a document with a reason, language, a first quality.

    texts --tidy--> repaired, boilerplate cut --measure--> counts --identify--> languages --rules--> kept | dropped

`tidy` and `measure` read bytes in compiled code, `rules.Rules` holds the thresholds with their sources, and rules
look at a whole batch at once; only what is dropped is touched one by one. The rules for running text are not asked of
listings (dictionary and terminology text) and code, which are only checked for length, encoding and, listings,
repeated lines. Nothing is normalised: the tokenizer does not, either; full-width letters and composed and decomposed
accents stay as they are.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from galenic.corpus.cleaning.counting import HAN, LATIN, SCRIPTS
from galenic.corpus.cleaning.language import HARDLY_HAN, MOSTLY_HAN, identify
from galenic.corpus.cleaning.measure import measure
from galenic.corpus.cleaning.rules import Rules
from galenic.corpus.cleaning.tidy import tidy
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document
from galenic.corpus.texts import buffers, column

if TYPE_CHECKING:
    import pyarrow as pa

Form = Literal["prose", "listing", "code"]
STARTER = Rules(
    longest=20_000, hashes=1, ended_lines=0, repeated_line_characters=1, repeated_ngrams=(1.0,) * 6
)
"""Of the starter's documents, none of which is a book or a page of the web: the documentation of Python among them is
wrapped at 72 columns and repeats the names it explains."""
FULL_LENGTH = 400
"""Characters from which length adds nothing to quality."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def repair(text: str) -> str:
    r"""Mends what is never meant: control characters, foreign line ends, trailing blanks, heaps of blank lines.

    >>> repair("a\r\nb \x00\n\n\n\n\nc")
    'a\nb\n\n\nc'
    """
    repaired, _, _ = tidy(*_bytes([text]), cut=False)
    return repaired.tobytes().decode("utf-8", "surrogatepass")


def clean_table(table: "pa.Table", *, form: Form, rules: Rules) -> "tuple[pa.Table, pa.Table]":
    """Repairs, checks, labels and scores a batch of documents.

    Args:
        table: with columns `id`, `text` and, if declared, `language` (empty or null where it is not); others pass.
        form: which rules fit.
        rules: their thresholds.

    Returns:
        (kept documents: the same columns with the text repaired and the language filled in, and `quality` in [0, 1]
        and `cut_lines`, how many lines of boilerplate went; dropped ones: `id`, `reason`, `detail`, `text` as it
        came), both in the order of the table.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    given = table["text"].cast(pa.large_string())
    given = (pc.fill_null(given, "") if given.null_count else given).combine_chunks()
    if isinstance(given, pa.ChunkedArray):  # an empty table
        given = column([])
    there = "language" in table.column_names
    declared = table["language"].to_pylist() if there else [None] * len(table)
    done = _cleaned(*buffers(given), declared, form, rules)

    keep = np.array([not reason for reason in done.reasons], dtype=bool)
    gone = np.flatnonzero(~keep)
    dropped = pa.table(
        {
            "id": table["id"].take(gone),
            "reason": column(done.reasons[i] for i in gone),
            "detail": column(done.details[i] for i in gone),
            "text": given.take(pa.array(gone)),
        }
    )
    texts = pa.LargeStringArray.from_buffers(len(given), pa.py_buffer(done.starts), pa.py_buffer(done.data))
    kept = table.set_column(table.column_names.index("text"), "text", texts)
    if there:
        labels = pa.array(done.labels, type=table.schema.field("language").type)
        kept = kept.set_column(table.column_names.index("language"), "language", labels)
    else:
        kept = kept.append_column("language", pa.array(done.labels, type=pa.string()))
    kept = kept.append_column("quality", pa.array(done.quality, type=pa.float64()))
    kept = kept.append_column("cut_lines", pa.array(done.tidied["cut_lines"].astype(np.int32)))
    return kept.filter(pa.array(keep)), dropped


class _Cleaned(NamedTuple):
    """What is known of a batch; texts and lists are of every document, kept or not."""

    data: np.ndarray
    starts: np.ndarray
    tidied: np.ndarray
    labels: list[str]
    reasons: list[str]
    details: list[str]
    quality: list[float]


def _cleaned(
    data: np.ndarray, starts: np.ndarray, declared: list[str | None] | None, form: Form, rules: Rules
) -> _Cleaned:
    """Cleans texts; without a list of declared languages, they are English, Chinese or both."""
    data, starts, tidied = tidy(data, starts, cut=form == "prose")
    measures = measure(data, starts, longest=4 * rules.longest)
    if form == "code":
        labels = ["code"] * len(measures)
    elif declared is None:
        labels = _of_script(measures)
    else:
        labels = _labels(data, starts, measures, declared)
    reasons, details = _judge(measures, tidied, labels, form, rules)
    return _Cleaned(data, starts, tidied, labels, reasons, details, _quality(measures, form, rules))


def _labels(
    data: np.ndarray, starts: np.ndarray, measures: np.ndarray, declared: list[str | None]
) -> list[str]:
    labels = [label or "" for label in declared]
    unknown = np.array([i for i, label in enumerate(labels) if not label], dtype=np.int64)
    for i, label in zip(unknown, identify(data, starts, measures, unknown), strict=True):
        labels[i] = label
    return labels


def _of_script(measures: np.ndarray) -> list[str]:
    share = measures["scripts"][:, HAN] / np.maximum(measures["letters"], 1)
    return np.where(share > MOSTLY_HAN, "zh", np.where(share < HARDLY_HAN, "en", "en-zh")).tolist()


def _judge(
    m: np.ndarray, tidied: np.ndarray, labels: list[str], form: Form, rules: Rules
) -> tuple[list[str], list[str]]:
    """Returns for each document the first rule it breaks, with the numbers, or two empty strings."""
    reasons, details = [""] * len(m), [""] * len(m)

    def drop(
        reason: str,
        numbers: np.ndarray,
        words: str,
        *,
        above: Any = None,
        below: Any = None,
        where: Any = True,
    ):
        broken = where & (numbers > above if below is None else numbers < below)
        for i in np.flatnonzero(broken):
            if not reasons[i]:
                limit = f"at most {above}" if below is None else f"at least {below}"
                reasons[i], details[i] = reason, f"{words.format(numbers[i])}, {limit}"

    words, lines, letters = (np.maximum(m[name], 1) for name in ("words", "lines", "letters"))
    characters, word_characters = np.maximum(m["characters"], 1), np.maximum(m["word_characters"], 1)
    prose = form == "prose"
    gone = tidied["cut_characters"]
    drop(
        "boilerplate",
        gone / np.maximum(gone + m["characters"], 1),
        "{:.0%} boilerplate",
        above=rules.boilerplate,
    )
    drop("too short", m["characters"], "{} characters", below=rules.shortest)
    drop("too long", m["characters"], "{} characters", above=rules.longest)
    drop("broken encoding", m["replaced"], "{} replacement characters", above=rules.replaced)
    mojibake = m["mojibake"] + tidied["lost_mojibake"]
    drop("broken encoding", mojibake, "{} sequences of UTF-8 read as another encoding", above=rules.mojibake)
    if rules.languages and form != "code":
        wanted = {*rules.languages, *(["en-zh"] if {"en", "zh"} <= set(rules.languages) else [])}
        for i, label in enumerate(labels):
            if label not in wanted and not reasons[i]:
                reasons[i], details[i] = "language", f"{label}, wanted {', '.join(rules.languages)}"
    if form == "code":
        return reasons, details
    drop("repetition", m["repeated_lines"] / lines, "{:.0%} of the lines repeat", above=rules.repeated_lines)
    if not prose:
        return reasons, details

    scripts = m["scripts"] / letters[:, None]
    han = scripts[:, HAN] >= HARDLY_HAN
    spaced = scripts[:, [LATIN, SCRIPTS.index("cyrillic") + 1, SCRIPTS.index("greek") + 1]].sum(1) > 0.5
    english = np.array([label == "en" for label in labels], dtype=bool) & ~han
    drop("placeholder", tidied["placeholders"], "{} times lorem ipsum", above=0)
    drop("too short", m["words"], "{} words", below=rules.fewest_words)
    drop("too long", m["words"], "{} words", above=rules.most_words, where=~han)
    mean = m["word_characters"] / words
    drop("word length", mean, "mean word length {:.1f}", below=rules.shortest_mean_word, where=spaced & ~han)
    drop("word length", mean, "mean word length {:.1f}", above=rules.longest_mean_word, where=spaced & ~han)
    several = m["words"] >= rules.stop_words_from
    drop(
        "not running text",
        m["stop_words"],
        "{} different stop words",
        below=rules.stop_words,
        where=english & several,
    )
    drop(
        "symbols",
        m["lettered_words"] / words,
        "{:.0%} of the words have a letter",
        below=rules.lettered_words,
    )
    drop("symbols", m["digits"] / word_characters, "{:.0%} digits", above=rules.digits)
    drop("symbols", m["hashes"] / words, "{:.2f} hash signs a word", above=rules.hashes)
    drop("symbols", m["ellipses"] / words, "{:.2f} ellipses a word", above=rules.ellipses)
    drop("symbols", m["url_characters"] / characters, "{:.0%} in web addresses", above=rules.urls)
    many = m["lines"] >= rules.lines_from
    for name, text, above in (
        ("bullet_lines", "begin with a bullet", rules.bullet_lines),
        ("ellipsis_lines", "end with an ellipsis", rules.ellipsis_lines),
        ("short_lines", "are short", rules.short_lines),
        ("code_lines", "end like code", rules.code_lines),
    ):
        drop("not running text", m[name] / lines, f"{{:.0%}} of the lines {text}", above=above, where=many)
    ended = m["ended_lines"] / lines
    drop("not running text", ended, "{:.0%} of the lines end a sentence", below=rules.ended_lines, where=many)
    repeated = m["repeated_line_characters"] / np.maximum(m["line_characters"], 1)
    drop("repetition", repeated, "{:.0%} in repeated lines", above=rules.repeated_line_characters)
    enough = m["words"] >= rules.ngrams_from
    for i, limit in enumerate(rules.top_ngrams):
        share = np.minimum(m["top"][:, i] / word_characters, 1)
        drop("repetition", share, f"top {i + 2}-gram covers {{:.0%}}", above=limit, where=enough)
    for chosen, limits in ((~han, rules.repeated_ngrams), (han, rules.repeated_ngrams_zh)):
        for i, limit in enumerate(limits):
            share = m["repeated"][:, i] / word_characters
            drop(
                "repetition", share, f"{{:.0%}} in repeated {i + 5}-grams", above=limit, where=enough & chosen
            )
    adverts = tidied["adverts"]
    dense = adverts >= np.maximum(rules.adverts, rules.advert_density * m["words"])
    drop("advertisement", adverts, "{} phrases of advertisements", above=rules.adverts - 1, where=dense)
    return reasons, details


def _quality(m: np.ndarray, form: Form, rules: Rules) -> list[float]:
    """Scores texts in [0, 1] by how far they stay from the rules: length, repeated lines, words with letters.

    A first form: the mean of three margins. It ranks stubs below full paragraphs and says nothing about truth.
    """
    length = np.minimum(1.0, m["characters"] / FULL_LENGTH)
    repeated = m["repeated_lines"] / np.maximum(m["lines"], 1)
    fresh = 1.0 if form == "code" else np.maximum(0.0, 1 - repeated / max(rules.repeated_lines, 1e-9))
    lettered = m["lettered_words"] / np.maximum(m["words"], 1)
    return [round(score, 4) for score in ((length + fresh + lettered) / 3).tolist()]


# ---------------------------------------------------------------------------- the starter


def clean_documents(documents: Sequence[Document]) -> list[tuple[Document | None, str, str]]:
    """Cleans documents of the starter, whose sources are known to be English and Chinese.

    Returns:
        for each document (document, "", "") if it is kept, (None, reason, detail) if not. `value` is how far its source
        is trusted in medicine.
    """
    out: list[tuple[Document | None, str, str]] = [(None, "broken encoding", "lone surrogate")] * len(
        documents
    )
    for form in ("prose", "listing", "code"):
        which = [
            i
            for i, document in enumerate(documents)
            if SOURCES[document.source].form == form and not _SURROGATE.search(document.text)
        ]
        done = _cleaned(*_bytes(documents[i].text for i in which), None, form, STARTER)
        for k, i in enumerate(which):
            if done.reasons[k]:
                out[i] = None, done.reasons[k], done.details[k]
                continue
            kept = replace(
                documents[i],
                text=done.data[done.starts[k] : done.starts[k + 1]].tobytes().decode(),
                language=done.labels[k],
                quality=done.quality[k],
                value=SOURCES[documents[i].source].trust if documents[i].department else 0.0,
            )
            out[i] = kept, "", ""
    return out


def clean(document: Document) -> tuple[Document | None, str, str]:
    """Cleans one document of the starter, as `clean_documents` does; many at once are faster."""
    return clean_documents([document])[0]


def defect(text: str, form: Form) -> tuple[str, str]:
    """Returns (reason, detail) of the first rule of the starter a text breaks, or two empty strings."""
    if _SURROGATE.search(text):
        return "broken encoding", "lone surrogate"
    done = _cleaned(*_bytes([text]), None, form, STARTER)
    return done.reasons[0], done.details[0]


def quality(text: str, form: Form) -> float:
    """Scores a text in [0, 1] as `clean_table` does."""
    return _quality(_measured(text), form, STARTER)[0]


def language(text: str) -> str:
    """Labels a text by script alone: `zh` above 60% Han letters, `en` below 5%, `en-zh` between."""
    return _of_script(_measured(text))[0]


def han_share(text: str) -> float:
    """Returns the share of letters that are Han characters, in [0, 1]."""
    m = _measured(text)
    return float(m["scripts"][0, HAN] / max(m["letters"][0], 1))


def repeated_line_share(text: str) -> float:
    """Returns the share of non-blank lines that already occurred."""
    m = _measured(text)
    return float(m["repeated_lines"][0] / max(m["lines"][0], 1))


def top_ngram_share(words: list[str], n: int) -> float:
    """Returns the share of the words' characters that the 2-, 3- or 4-gram covers which covers most, if it repeats."""
    m = _measured(" ".join(words))
    return min(1.0, float(m["top"][0, n - 2] / max(m["word_characters"][0], 1)))


def _bytes(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns texts as bytes and where each begins; a lone surrogate keeps its three bytes."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    starts = np.cumsum([0, *map(len, encoded)])
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), starts


def _measured(text: str) -> np.ndarray:
    return measure(*_bytes([text]))
