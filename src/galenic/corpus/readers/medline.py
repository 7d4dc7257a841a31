"""PubMed and MEDLINE citations in NLM's XML: title, abstract, headings.

Source: NLM's `pubmed_250101.dtd` and "MEDLINE PubMed XML Element Descriptions". The DTD that a file names is not
fetched.
"""

from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

from galenic.corpus.readers.departments import GENERAL, of_text
from galenic.corpus.readers.files import Note
from galenic.corpus.readers.tables import Record
from galenic.corpus.readers.xml_stream import words, xml_records

_LANGUAGES = {
    "eng": "en",
    "chi": "zh",
    "fre": "fr",
    "ger": "de",
    "spa": "es",
    "jpn": "ja",
    "por": "pt",
    "rus": "ru",
}

# The kinds of publication that say what a text is like, the more telling first.
_KINDS = {
    "Practice Guideline": "practice guideline",
    "Guideline": "practice guideline",
    "Meta-Analysis": "systematic review",
    "Systematic Review": "systematic review",
    "Review": "review",
    "Randomized Controlled Trial": "clinical trial",
    "Clinical Trial": "clinical trial",
    "Case Reports": "case report",
}


def medline_records(stream: Any, note: Note) -> Iterator[Record]:
    """Yields the abstracts of a `PubmedArticleSet`; the key is the PMID.

    An abstract in another language is a record of its own, `PMID:language`. The category is the kind of publication,
    the department what the MeSH headings speak of. Citations without an abstract and retracted ones are dropped.

    Raises:
        Unreadable: see `xml_records`.
    """
    tags = frozenset(("PubmedArticle", "PubmedBookArticle"))
    for number, entry in enumerate(xml_records(stream, tags, frozenset(("PubmedArticleSet",))), start=1):
        citation = entry.find("MedlineCitation")
        if citation is None:
            citation = entry.find("BookDocument")
        key = "" if citation is None else words(citation.find("PMID"))
        if citation is None or not key.isdecimal():
            note(
                f"record {number}",
                "malformed record",
                f"{entry.tag} {number} without a PMID",
                words(entry)[:2000],
            )
            continue
        article = citation.find("Article")
        yield from _citation(key, citation, citation if article is None else article, note)


def _citation(key: str, citation: Element, article: Element, note: Note) -> Iterator[Record]:
    title = words(article.find("ArticleTitle"))
    if title.startswith("["):  # a title that NLM translated
        title = title.removesuffix(".").removeprefix("[").removesuffix("]") + "."
    kinds = {words(kind) for kind in article.iterfind(".//PublicationType")}
    if "Retracted Publication" in kinds:
        note(key, "retracted", "a retracted publication", title)
        return
    headings = [words(name) for name in citation.iterfind("MeshHeadingList/MeshHeading/DescriptorName")]
    department = of_text(" ".join(headings), at_least=1) if headings else GENERAL
    hints = {
        "category": next((kind for name, kind in _KINDS.items() if name in kinds), "research article"),
        "department": "" if department == GENERAL else department,
    }
    abstract = _sections(article.find("Abstract"))
    others = [(other.get("Language", ""), _sections(other)) for other in citation.iterfind("OtherAbstract")]
    if not abstract and not any(text for _, text in others):
        note(key, "empty", "no abstract", title)
    spoken = [words(language) for language in article.iterfind("Language")]
    if abstract:
        text = f"# {title}\n\n{abstract}" if title else abstract
        yield Record(key, text, "en" if spoken == ["eng"] else "", **hints)
    for language, text in others:
        if text:
            vernacular = words(article.find("VernacularTitle")) if language in spoken else ""
            text = f"# {vernacular}\n\n{text}" if vernacular else text
            yield Record(f"{key}:{language}", text, _LANGUAGES.get(language, ""), **hints)


def _sections(abstract: Element | None) -> str:
    """Returns the parts of an abstract, each with its label as in print."""
    parts = []
    for part in abstract.iterfind("AbstractText") if abstract is not None else ():
        text, label = words(part), part.get("Label", "").strip()
        if text:
            parts.append(text if label in ("", "UNLABELLED") else f"{label}: {text}")
    return "\n\n".join(parts)
