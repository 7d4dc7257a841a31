"""Folders of documents, a file each: plain text, Markdown, HTML.

HTML is taken apart by a small scanner of our own. The best known program for it brings more than a dozen packages and
changes with its versions, and with it would the corpus; the parser of the standard library takes hours for a few
megabytes of unclosed tags, this one is linear in the size of the page.
"""

import codecs
import html
import re
from collections.abc import Iterator

from galenic.corpus.readers.files import File, Note
from galenic.corpus.readers.lines import LONGEST
from galenic.corpus.readers.tables import Record

_MARKS = (  # a byte-order mark declares the encoding; the longer ones first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (b"\x84\x31\x95\x33", "gb18030"),
)
_CHARSET = re.compile(rb"""(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""")
# As browsers take them: the names that pages use for less than they contain.
_WIDER = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "x-gbk": "gb18030",
    "iso-8859-1": "cp1252",
    "latin1": "cp1252",
}


def page_records(file: File, format: str, note: Note) -> Iterator[Record]:
    """Reads a file as one document; the key is its name.

    A byte-order mark, or in HTML the declared charset, tells the encoding; it is UTF-8 otherwise. What does not
    decode, and files of more than `LONGEST` bytes, are dropped.
    """
    with file.open_stream() as stream:
        data = b""
        while len(data) <= LONGEST and (more := stream.read(LONGEST + 1 - len(data))):
            data += more
    if len(data) > LONGEST:
        detail = f"a file is one document, of at most {LONGEST} bytes; split it, or make JSON lines of it"
        note(file.name, "too long", detail, data[:8000].decode("utf-8", "ignore"))
        return
    try:
        text = decoded(data, declared=format == "html")
    except (UnicodeDecodeError, LookupError) as error:
        place = (
            f"not {error.encoding} at byte {error.start}" if isinstance(error, UnicodeError) else str(error)
        )
        note(file.name, "broken encoding", place, data[:8000].decode("utf-8", "replace"))
        return
    if format == "html":
        text = text_of_html(text)
    elif format == "markdown":
        text = text_of_markdown(text)
    yield Record(file.name, text)


def decoded(data: bytes, *, declared: bool) -> str:
    """Decodes text by its byte-order mark, by the charset that its head declares (if `declared`), or as UTF-8.

    Raises:
        UnicodeDecodeError: the bytes are something else.
        LookupError: the declared charset is unknown.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    found = _CHARSET.search(data[:4096]) if declared else None
    name = found[1].decode().lower() if found else "utf-8"
    name = _WIDER.get(name, name)
    # A head in ASCII that declares UTF-16 is not in UTF-16.
    return data.decode("utf-8" if name.startswith("utf-16") else codecs.lookup(name).name)


# ---------------------------------------------------------------------------- Markdown

_FRONT = re.compile(r"\A---[ \t]*\r?\n.*?^(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^ {0,3}(?:`{3,}|~{3,})", re.MULTILINE)
_DEFINITION = re.compile(r"^ {0,3}\[[^\]\n]+\]:[ \t]*\S+.*\n?", re.MULTILINE)
_LINK = re.compile(
    r"!?\[([^\[\]\n]*)\](?:\([^()\s]*(?:\([^()\s]*\)[^()\s]*)?(?:\s+[\"'][^\"'\n]*[\"'])?\)|\[[^\]\n]*\])"
)
_AUTOLINK = re.compile(r"<((?:https?|mailto):[^<>\s]+)>")


def text_of_markdown(text: str) -> str:
    """Takes the front matter off and leaves of links, images and comments what a reader sees; code stays as it is."""
    text = _FRONT.sub("", text, count=1)
    parts, start, fence = [], 0, ""
    for match in _FENCE.finditer(text):
        mark = match[0].strip()
        if not fence:
            parts.append(_links(text[start : match.start()]))
            start, fence = match.start(), mark
        elif mark.startswith(fence):
            end = text.find("\n", match.start())
            end = len(text) if end < 0 else end
            parts.append(text[start:end])
            start, fence = end, ""
    parts.append(text[start:] if fence else _links(text[start:]))
    return "".join(parts).strip()


def _links(text: str) -> str:
    text = _DEFINITION.sub("", _without_comments(text))
    text = _LINK.sub(r"\1", _LINK.sub(r"\1", text))  # twice: an image may be the text of a link
    return _AUTOLINK.sub(r"\1", text)


def _without_comments(text: str) -> str:
    parts, place = [], 0
    while (start := text.find("<!--", place)) >= 0 and (end := text.find("-->", start + 4)) >= 0:
        parts.append(text[place:start])
        place = end + 3
    return "".join(parts) + text[place:]


# ---------------------------------------------------------------------------- HTML

_RAW = frozenset(("script", "style", "textarea", "title", "noscript", "iframe", "template", "svg", "xmp"))
_AWAY = frozenset(
    "nav footer aside button select datalist dialog menu object canvas audio video map label".split()
)
_BLOCKS = frozenset(
    "p div section article main header h1 h2 h3 h4 h5 h6 ul ol li dl dt dd table tr thead tbody tfoot caption "
    "blockquote pre figure figcaption address hr body html head center details summary fieldset".split()
)
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
_CLASSED = frozenset("div section ul ol dl table span header".split())  # whose end tag is not left out
_TAG = re.compile(r"(/?)([A-Za-z][^\s/>]*)")
# What follows the name of a tag, its `>` included; one in quotes after `=` does not count. Possessive: never goes back.
_REST = re.compile(r"""[^>=]*+(?:=\s*+(?:"[^"]*+"|'[^']*+')?+[^>=]*+)*+>""")
_ATTRIBUTE = re.compile(r"""([^\s"'=<>/]+)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+))?""")
_ROLES = ("navigation", "banner", "contentinfo", "complementary", "search")
_PART = re.compile(
    r"(?:(?:site|page|main|global|top|bottom|left|right|primary|secondary|mobile)[-_]?)?"
    r"(?:nav|navbar|navigation|menu|breadcrumbs?|footer|sidebar|cookies?|advert|ads?|share|sharing|social|newsletter"
    r"|pagination|pager|toolbar|skip-?link)(?:[-_](?:wrapper|container|bar|links?|menu|list|content|notice|banner))?",
    re.IGNORECASE,
)
_MOST_LINKS = 0.5  # share of a block's letters that may stand in links
_LEAST_MAIN = 200  # characters; a shorter <main> or <article> is not the content


Block = tuple[str, str, float, bool]
"""(mark in front, text, share of it in links, whether it lies in the main part)"""


class _Page:
    """Blocks of text in order, as the tags come."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.away = ""  # the tag whose content is passed over
        self.depth = 0  # how many of them are open
        self.main = self.link = self.pre = 0
        self.mark = ""
        self.words: list[str] = []
        self.filled = False  # whether any of them is more than blank
        self.linked = 0
        self.title = ""

    def text(self, text: str) -> None:
        if not self.away:
            self.words.append(text)
            size = len(text.strip())
            self.filled |= size > 0
            self.linked += size if self.link else 0

    def block(self) -> None:
        text = "".join(self.words)
        size = len(text.strip())
        if size:
            if not self.pre:
                text = "\n".join(" ".join(line.split()) for line in text.split("\0"))
            else:
                text = text.replace("\0", "\n")
            self.blocks.append((self.mark, text.strip(), self.linked / size, self.main > 0))
            self.mark = ""
        self.words, self.filled, self.linked = [], False, 0

    def tag(self, closing: bool, name: str, rest: str) -> None:
        if self.away:
            if name == self.away and not rest.endswith("/"):
                self.depth += -1 if closing else 1
                self.away = self.away if self.depth else ""
            return
        if not closing and name not in _VOID and _is_away(name, rest, self.main > 0):
            self.block()
            self.away, self.depth = name, 1
            return
        step = -1 if closing else 1
        if name == "br":
            self.words.append("\0")
        elif name == "a":
            self.link = max(0, min(1, self.link + step))  # links do not nest; one left open ends at the next
        elif name in ("td", "th"):
            if not closing and self.filled:
                self.words.append(" | ")
        elif name in _BLOCKS:
            self.block()
            self.link = 0
            if name in ("main", "article"):
                self.main = max(0, self.main + step)
            elif name == "pre":
                self.pre = max(0, self.pre + step)
            if not closing:
                if len(name) == 2 and name[0] == "h" and name[1].isdigit():
                    self.mark = "#" * int(name[1]) + " "
                else:
                    self.mark = "- " if name == "li" else self.mark if name in ("p", "div") else ""
            elif name not in ("p", "div"):
                self.mark = ""


def _is_away(name: str, rest: str, in_main: bool) -> bool:
    if name in _AWAY or (name == "header" and not in_main):
        return True
    if name not in _CLASSED:
        return False
    for attribute, quoted in _ATTRIBUTE.findall(rest[:2000].lower()):
        value = quoted.strip("\"'")
        if attribute == "hidden" or (attribute == "aria-hidden" and value == "true"):
            return True
        if attribute == "style" and re.search(r"display\s*:\s*none", value):
            return True
        if attribute == "role" and value in _ROLES:
            return True
        if attribute in ("class", "id") and any(_PART.fullmatch(word) for word in value.split()):
            return True
    return False


def text_of_html(page: str) -> str:
    """Returns the running text of a page: headings, paragraphs, lists and tables, without what surrounds them.

    Passed over are scripts and styles, what its tag, role or class says is navigation, header or footer, what is
    hidden, and blocks that are mostly links. If `<main>` or `<article>` hold text, only that is the page.
    """
    found = _scan(page)
    kept = [block for block in found.blocks if block[0].startswith("#") or block[2] <= _MOST_LINKS]
    main = [block for block in kept if block[3]]
    if sum(len(block[1]) for block in main) >= _LEAST_MAIN:
        kept = main
    while kept and kept[-1][0].startswith("#"):
        kept.pop()  # a heading of nothing
    if found.title and kept and not any(mark == "# " for mark, *_ in kept):
        kept.insert(0, ("# ", found.title, 0.0, True))
    out: list[str] = []
    for index, (mark, text, *_) in enumerate(kept):
        listed = mark == "- " and index > 0 and kept[index - 1][0] == "- "
        out += ["\n" if listed else "\n\n" if out else "", mark, text]
    return "".join(out)


def _scan(page: str) -> _Page:
    """Walks over the tags; every step goes forward, so that broken pages cost no more than whole ones."""
    found = _Page()
    place = 0
    while (start := page.find("<", place)) >= 0:
        found.text(html.unescape(page[place:start]))
        if page.startswith("<!--", start):
            end = page.find("-->", start + 4)
            place = end + 3 if end >= 0 else len(page)
            continue
        tag = _TAG.match(page, start + 1)
        if tag is None and page[start + 1 : start + 2] not in ("!", "?", "/"):
            found.text("<")  # a sign, such as `p < 0.05`
            place = start + 1
            continue
        rest = _REST.match(page, tag.end() if tag else start + 1)
        place = rest.end() if rest else len(page)
        if tag is None:
            continue
        name = tag[2].lower()
        attributes = page[tag.end() : place - 1]
        if name not in _RAW:
            found.tag(bool(tag[1]), name, attributes)
        elif not tag[1] and not attributes.endswith("/"):
            close = re.compile("</" + name, re.IGNORECASE).search(page, place)
            end = close.start() if close else len(page)
            if name == "title" and not found.title and not found.away:
                found.title = " ".join(html.unescape(page[place:end]).split())
            place = end
    found.text(html.unescape(page[place:]))
    found.block()
    return found
