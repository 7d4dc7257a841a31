"""What datatrove's Gopher filters say of texts: a JSON list of texts in, a JSON list of [repetition, quality] out."""

import json
import sys

from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from loguru import logger


def reason(verdict):
    return "" if verdict is True else verdict[1]


logger.remove()
repetition, quality = GopherRepetitionFilter(), GopherQualityFilter(min_doc_words=8)
texts = json.load(sys.stdin)
documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
print(json.dumps([[reason(repetition.filter(d)), reason(quality.filter(d))] for d in documents]))
