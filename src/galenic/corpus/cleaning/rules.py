"""The thresholds of cleaning, each with its source; light to import. `clean.py` applies them.

Sources: Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1 and table A1); C4 (Raffel et al. 2020, arXiv
1910.10683, section 2.2); FineWeb (Penedo et al. 2024, arXiv 2406.17557, values as in datatrove's FineWebQualityFilter);
MAP-CC (Du et al. 2024, arXiv 2404.04167, values as in `filter/filter.py` of Chinese-Tiny-LLM), whose n-grams are of
characters, as ours are in Chinese. "Ours" has no source but the reason given.
"""

from dataclasses import dataclass, fields

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a document must be to stay. Shares are in [0, 1]; a greatest share of 1 switches its rule off."""

    # ---- every document
    shortest: int = 40
    """Characters at least. Ours: less carries no statement."""
    longest: int = 1_000_000
    """Characters at most. Ours: a textbook; more is a dump. Gopher's 100,000 words are `most_words`."""
    replaced: int = 0
    """Replacement characters (U+FFFD) at most. Ours: each stands for something lost."""
    mojibake: int = 1
    """Sequences of UTF-8 read as another encoding at most. Ours: one may be meant, as in a text about it."""
    languages: tuple[str, ...] = ()
    """Those wanted, such as en, zh; all if empty. A text in two of them (en-zh) is wanted if both are."""

    # ---- listings and prose
    repeated_lines: float = 0.30
    """Greatest share of lines that occurred before. Gopher, table A1."""

    # ---- prose
    fewest_words: int = 8
    """Ours: a short statement; Gopher's 50 would drop most definitions. A Han character is a word."""
    most_words: int = 100_000
    """Gopher. Not for Chinese, where it would be a short book."""
    shortest_mean_word: float = 3.0
    """Characters of a word on average at least, below 5% Han letters. Gopher."""
    longest_mean_word: float = 10.0
    """The same, at most. Gopher."""
    stop_words: int = 2
    """Different stop words of English at least, in English texts. Gopher."""
    stop_words_from: int = 30
    """Words from which the rule holds. Ours: a sentence may do without."""
    lettered_words: float = 0.70
    """Least share of words with a letter. Gopher has 0.80; ours, as medicine has doses and laboratory values."""
    digits: float = 0.30
    """Greatest share of digits among letters and digits. MAP-CC."""
    hashes: float = 0.10
    """Greatest number of hash signs for each word. Gopher."""
    ellipses: float = 0.10
    """Greatest number of ellipses for each word. Gopher."""
    bullet_lines: float = 0.90
    """Greatest share of lines that begin with a bullet. Gopher."""
    ellipsis_lines: float = 0.30
    """Greatest share of lines that end with an ellipsis. Gopher."""
    short_lines: float = 0.67
    """Greatest share of lines of at most 30 letters or 10 Han characters. FineWeb; the Han characters are ours."""
    ended_lines: float = 0.12
    """Least share of lines that end with terminal punctuation. FineWeb."""
    code_lines: float = 0.30
    """Greatest share of lines that end with a brace or a semicolon. Ours; C4 drops a page for one brace."""
    lines_from: int = 10
    """Lines from which the five rules on lines above hold. Ours: a few headings and an address say nothing."""
    urls: float = 0.20
    """Greatest share of characters in web addresses. Ours: a link list."""
    repeated_line_characters: float = 0.20
    """Greatest share of characters in lines that occurred before. Gopher, table A1."""
    top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Greatest share of characters of the 2-, 3-, 4-gram that covers most. Gopher, table A1; MAP-CC has the same."""
    repeated_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Greatest share of characters in 5-, ... 10-grams that occurred before. Gopher, table A1."""
    repeated_ngrams_zh: tuple[float, ...] = (0.60,) * 6
    """The same where at least 5% of the letters are Han: an n-gram of characters says less. MAP-CC."""
    ngrams_from: int = 100
    """Words from which n-grams count. Ours: one is a large share of a short text by arithmetic, not by fault."""

    # ---- prose of pages
    boilerplate: float = 0.50
    """Greatest share of characters in lines of boilerplate; below it these lines go and the rest stays. Ours."""
    adverts: int = 3
    """Different phrases of advertisements from which a document is one, if dense. Ours."""
    advert_density: float = 0.01
    """Such phrases for each word from which it is. Ours: three in 300 words."""

    def __post_init__(self) -> None:
        for name, size in (("top_ngrams", 3), ("repeated_ngrams", 6), ("repeated_ngrams_zh", 6)):
            if len(getattr(self, name)) != size:
                raise UserError(f"rules.{name}: {len(getattr(self, name))} shares given, {size} are needed")
        counts = (*_WHOLE, "shortest_mean_word", "longest_mean_word", "hashes", "ellipses", "advert_density")
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, str):
                    continue
                if number < 0 or (number > 1 and field.name not in counts):
                    allowed = "0 or more" if field.name in counts else "in [0, 1]"
                    raise UserError(f"rules.{field.name}: {number} is not {allowed}")
        for low, high in (
            ("shortest", "longest"),
            ("fewest_words", "most_words"),
            ("shortest_mean_word", "longest_mean_word"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise UserError(
                    f"rules: {low} {getattr(self, low)} is above {high} {getattr(self, high)}, so nothing would be left"
                )
        if "en-zh" in self.languages:
            raise UserError(
                "rules.languages: en-zh is not a language; texts in both stay if en and zh are wanted"
            )


_WHOLE = (
    "shortest",
    "longest",
    "replaced",
    "mojibake",
    "fewest_words",
    "most_words",
    "stop_words",
    "stop_words_from",
    "lines_from",
    "ngrams_from",
    "adverts",
)
