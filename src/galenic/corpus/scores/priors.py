"""What is held of the starter's sources: classes that a whole source has, and priors for its scores."""

from galenic.corpus.readers.sources import SOURCES

PRIORS: dict[str, tuple[float, float, float]] = {
    "wikipedia": (0.8, 0.2, 0.8),
    "wikipedia-health": (0.9, 0.3, 0.9),
    "hsk": (0.6, 0.05, 0.1),
    "cedict": (0.5, 0.05, 0.5),
    "python-docs": (0.9, 0.4, 0.8),
    "python-code": (0.5, 0.7, 0.5),
    "arithmetic": (0.7, 1.0, 0.2),
    "icd10cm": (0.5, 0.1, 0.7),
    "mesh": (0.4, 0.05, 0.6),
    "drugs": (0.3, 0.05, 0.5),
    "abbreviations": (0.4, 0.0, 0.5),
    "disease-tables": (0.6, 0.1, 0.7),
    "hpo": (0.8, 0.1, 0.9),
    "radiology": (0.8, 0.4, 0.9),
    "guidelines": (1.0, 0.7, 1.0),
    "reasoning": (0.7, 1.0, 0.6),
    "questions": (0.9, 0.6, 0.8),
    "small talk": (0.1, 0.1, 0.1),
    "made: note": (0.5, 0.5, 0.5),
    "made: abstract": (0.8, 0.8, 0.8),
    "made: knowledge": (0.8, 0.3, 0.8),
    "made: health-advertisement": (0.0, 0.05, 0.05),
    "made: e-commerce": (0.0, 0.05, 0.05),
    "made: news": (0.3, 0.15, 0.4),
    "made: social-media": (0.0, 0.05, 0.02),
    "made: entertainment": (0.1, 0.1, 0.15),
}
"""Origin -> (educational, reasoning, knowledge). Ours."""
TRUST: dict[str, float] = {
    **{name: source.trust for name, source in SOURCES.items()},
    "questions": 0.8,
    "made: note": 0.7,
    "made: abstract": 0.9,
    "made: knowledge": 0.6,
    "made: health-advertisement": 0.05,
}
"""Origin -> medical value of what is medical in it: the source table's trust."""
QUALITY: dict[str, float] = {
    "made: health-advertisement": 0.3,
    "made: e-commerce": 0.4,
    "made: social-media": 0.4,
    "made: entertainment": 0.7,
    "small talk": 0.6,
}
"""Origin -> quality of its unharmed text, if not 1."""

GENERAL_OF: dict[str, str] = {
    "hsk": "language",
    "cedict": "language",
    "python-docs": "programming",
    "python-code": "programming",
    "arithmetic": "mathematics",
    "made: e-commerce": "e-commerce",
    "made: health-advertisement": "e-commerce",
    "made: news": "news",
    "made: social-media": "social media",
    "made: entertainment": "entertainment",
}
"""Origin -> general class, where all its texts are of one."""
CONTENT_OF: dict[str, str] = {
    "wikipedia": "encyclopedia entry",
    "wikipedia-health": "encyclopedia entry",
    "hsk": "dictionary entry",
    "cedict": "dictionary entry",
    "python-docs": "documentation",
    "python-code": "code",
    "arithmetic": "mathematics",
    "icd10cm": "terminology entry",
    "mesh": "terminology entry",
    "drugs": "terminology entry",
    "abbreviations": "terminology entry",
    "disease-tables": "terminology entry",
    "hpo": "terminology entry",
    "radiology": "terminology entry",
    "guidelines": "guideline",
    "reasoning": "question and answer",
    "questions": "question and answer",
    "small talk": "dialogue",
    "made: note": "clinical note",
    "made: abstract": "research abstract",
    "made: knowledge": "encyclopedia entry",
    "made: health-advertisement": "advertisement",
    "made: e-commerce": "advertisement",
}
"""Origin -> content type."""
DIALOGUE_CLASSES: dict[str, str] = {
    "tech_support": "technology",
    "computers": "technology",
    "ai": "technology",
    "coding": "programming",
    "sports": "sports",
    "food": "food and agriculture",
    "history": "history",
    "literature": "literature and arts",
    "greetings": "social media",
    "conversations": "social media",
    "emotion": "psychology",
}
"""Category of the dialogues -> general class."""
