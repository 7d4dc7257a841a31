"""Reads a page and looks whether it is whole."""

import re
from html.parser import HTMLParser


class Balanced(HTMLParser):
    """Fails where tags do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.words = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.words.append("" if tag == "wbr" else " ")
        if tag not in ("meta", "path", "rect", "use", "line", "polyline", "stop", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "rect", "use", "line", "polyline", "stop"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))
