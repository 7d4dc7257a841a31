"""Wikipedia leads: a JSON object from title to `{"title", "extract", "topic"}`."""

from galenic.corpus.readers import Drop
from galenic.corpus.readers.bytes import parse_json, text
from galenic.corpus.readers.departments import of_text
from galenic.corpus.readers.sources import SOURCES
from galenic.corpus.records import Document

HEALTH_TOPIC = "Biology and health sciences"


def wikipedia_documents(data: bytes, name: str, drop: Drop) -> list[Document]:
    """Reads article leads; those on biology and health make a source of their own.

    Raises:
        UserError: the file is not a JSON object.
    """
    documents = []
    for key, record in parse_json(data, name, dict).items():
        fields = record if isinstance(record, dict) else {}
        topic = text(fields, "topic") or "Uncategorized"
        source = "wikipedia-health" if topic == HEALTH_TOPIC else "wikipedia"
        title, extract = text(fields, "title"), text(fields, "extract")
        if not title or not extract:
            missing = "title" if extract else "extract"
            drop(f"{source}/{key}", source, "malformed record", f"{name}: no {missing}", extract or title)
            continue
        documents.append(
            Document(
                id=f"{source}/{key}",
                text=f"# {title}\n\n{extract}",
                source=source,
                licence=SOURCES[source].licence,
                language="en",
                category=topic.lower(),
                department=of_text(extract) if source == "wikipedia-health" else "",
            )
        )
    return documents
