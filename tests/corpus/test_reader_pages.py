import time

import pytest
from reader_helpers import read, reasons, texts

from galenic.corpus.readers.lines import LONGEST
from galenic.corpus.readers.pages import text_of_html, text_of_markdown


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "gb18030"])
def test_a_mark_at_the_start_declares_the_encoding(tmp_path, encoding):
    text = "\ufeff肺炎 ä" if encoding == "gb18030" else "肺炎 ä"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert texts(read(tmp_path, "text")[0]) == {"s/a.txt": "肺炎 ä"}


def test_undeclared_encodings_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes("肺炎".encode("gb18030"))
    (tmp_path / "b.txt").write_bytes(b"fine until here \xff")
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_text("good")
    rows, drops = read(tmp_path, "text")
    assert texts(rows) == {"s/d.txt": "good"}
    assert [(d[0], d[1], d[2]) for d in drops] == [
        ("s/a.txt", "broken encoding", "not utf-8 at byte 0"),
        ("s/b.txt", "broken encoding", "not utf-8 at byte 16"),
        ("s/c.txt", "empty", "no text"),
    ]


def test_a_file_is_one_document_and_not_endless(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.write(b"x" * (LONGEST + 1))
    (tmp_path / "b.txt").write_bytes(b"x" * LONGEST)
    rows, drops = read(tmp_path, "text")
    assert [row["id"] for row in rows] == ["s/b.txt"] and reasons(drops) == [("s/a.txt", "too long")]
    assert "split it" in drops[0][2]


# ---------------------------------------------------------------------------- Markdown

MARKDOWN = """---
title: Asthma
tags: [a, b]
---
# Asthma

See [the guide](https://x.org/a_(b) "Title"), [ref][1] and ![a lung](lung.png).
[![badge](b.svg)](https://ci) <https://gina.org> a[1] <!-- hidden
note --> Dose: [0, 5] mg.

```python
x = [a](b)
# --- not front matter
```

---

Rest with [open](.

[1]: https://example.org "Example"
"""


def test_markdown_keeps_what_a_reader_sees():
    assert (
        text_of_markdown(MARKDOWN)
        == """# Asthma

See the guide, ref and a lung.
badge https://gina.org a[1]  Dose: [0, 5] mg.

```python
x = [a](b)
# --- not front matter
```

---

Rest with [open](."""
    )


def test_markdown_files(tmp_path):
    (tmp_path / "a.md").write_text("---\r\nx: 1\r\n---\r\nText [a](b).", newline="")
    (tmp_path / "b.markdown").write_text("---\nno end of it")
    (tmp_path / "c.md").write_text("---\nx: 1\n---\n")
    rows, drops = read(tmp_path, "markdown")
    assert texts(rows) == {"s/a.md": "Text a.", "s/b.markdown": "---\nno end of it"}
    assert reasons(drops) == [("s/c.md", "empty")]


@pytest.mark.parametrize(
    "piece", ["[", "[a](", "![", "<!--", "---\n", "```\n", "[a]: ", "<http:", "[a](b(", "~~~\n```\n"]
)
def test_markdown_of_broken_marks_takes_no_hours(piece):
    started = time.process_time()
    text_of_markdown(piece * (200_000 // len(piece)))
    assert time.process_time() - started < 5


# ---------------------------------------------------------------------------- HTML

PAGE = """<!DOCTYPE html>
<html><head><title>Asthma &mdash; Clinic</title><meta charset="utf-8">
<style>p > a { color: red }</style><script>if (a < b) document.write("<p>no</p>")</script></head>
<body class="has-sidebar">
<header><a href="/">Home</a><h1>The Clinic</h1></header>
<nav><ul><li><a href="/a">Asthma</a><li><a href="/b">Copd</a></ul></nav>
<div class="breadcrumb"><a href="/">Home</a> / Asthma</div>
<form id="aspnetForm">
<main>
<h1>Asthma</h1>
<p>Asthma is a <b>chronic</b> disease of the <a href="/lung">airways</a> (FEV<sub>1</sub> &lt; 80&nbsp;%, p < 0.05).
<p data-note="a > b" title='c > d'>Second paragraph<br>after a break.</p>
<ul><li>Cough</li><li>Wheeze <ul><li>at night</ul></ul>
<table><tr><th>Drug<th>Dose</tr><tr><td>Salbutamol</td><td>100 µg</td></tr></table>
<pre>  line 1
    line 2</pre>
<p><a href="/1">Related one</a> <a href="/2">Related two</a></p>
<div hidden>Hidden words</div><div style="display: none">More hidden words</div>
<p>Inhaled corticosteroids are the mainstay of treatment, and reliever inhalers are used as needed for symptoms.</p>
<h2>Share this</h2>
</main></form>
<aside>Subscribe now</aside><!-- <p>comment</p> -->
<footer>Imprint</footer></body></html>"""


def test_html_keeps_the_running_text():
    assert (
        text_of_html(PAGE)
        == """# Asthma

Asthma is a chronic disease of the airways (FEV1 < 80 %, p < 0.05).

Second paragraph
after a break.

- Cough
- Wheeze
- at night

Drug | Dose

Salbutamol | 100 µg

line 1
    line 2

Inhaled corticosteroids are the mainstay of treatment, and reliever inhalers are used as needed for symptoms."""
    )


def test_html_without_a_main_part_or_a_heading():
    page = "<title>Dengue</title><div id=menu>Menu</div><div>Dengue is a <i>viral</i> infection.</div>"
    assert text_of_html(page) == "# Dengue\n\nDengue is a viral infection."
    assert (
        text_of_html("<p>a<p class=share>b<p>c") == "a\n\nb\n\nc"
    )  # its end is left out, so nothing is passed over
    assert text_of_html('<div data-id="nav" title="hidden" class="has-menu">a</div>') == "a"
    assert text_of_html('<div title="x" class="site-nav wide">a</div><div id=Footer>b</div>c') == "c"
    assert text_of_html("plain text & more") == "plain text & more"
    assert text_of_html("") == "" and text_of_html("<nav>only</nav>") == ""


@pytest.mark.parametrize(
    ("declaration", "encoding"),
    [
        ('<meta charset="gb2312">', "gb18030"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=GBK">', "gbk"),
        ('<?xml version="1.0" encoding="gb18030"?>', "gb18030"),
        ("<meta charset=big5>", "big5"),
        ("", "utf-8"),
    ],
)
def test_html_says_its_charset(tmp_path, declaration, encoding):
    (tmp_path / "a.html").write_bytes(f"{declaration}<p>肺炎的治療</p>".encode(encoding))
    assert texts(read(tmp_path, "html")[0]) == {"s/a.html": "肺炎的治療"}


def test_html_that_lies_about_its_charset(tmp_path):
    (tmp_path / "a.html").write_bytes("<meta charset=utf-8><p>肺炎</p>".encode("gbk"))
    (tmp_path / "b.html").write_bytes(b"<meta charset=klingon><p>x</p>")
    (tmp_path / "c.html").write_bytes(b"<meta charset=iso-8859-1><p>dose \x96 \xb5g</p>")
    rows, drops = read(tmp_path, "html")
    assert texts(rows) == {"s/c.html": "dose – µg"}
    assert reasons(drops) == [("s/a.html", "broken encoding"), ("s/b.html", "broken encoding")]
    assert "unknown encoding: klingon" in drops[1][2]


BROKEN = [
    "<",
    "<a ",
    "<a b='",
    '<a b="',
    "<a b=c ",
    "<!--",
    "<!",
    "<?",
    "</",
    "<script>",
    "<div class=nav>",
    "&#",
]
BROKEN += ["<td>x", "<nav>", "<p>", "<title>", '<a b="c" ', "<li><ul>", "a<b=", "<pre>", "<a\n"]


@pytest.mark.parametrize("piece", BROKEN)
def test_broken_html_takes_no_hours(piece):
    started = time.process_time()
    text_of_html(piece * (2**20 // len(piece)) + "end")
    assert time.process_time() - started < 10
