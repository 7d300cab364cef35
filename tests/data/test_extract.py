"""Files to text, and what can not be text."""

import gzip

import pytest

from fullarc.data.extract import MAX_BYTES, Unreadable, extract

PAGE = b"""<html><head><title>t</title><style>x{}</style></head><body><nav><a>Home</a></nav>
<h1>Big &amp; bold</h1><div role="navigation">skip <div>me</div></div><p>One
two.</p><ul><li>first<li>second</ul><pre>a
  b</pre><script>evil()</script></body></html>"""
MAN = r""".\" a comment
.TH LS 1
.SH NAME
ls \- list
.SH SYNOPSIS
.B ls
.RI [ OPTION ]...
.TP
\fB\-a\fR, \fB\-\-all\fP
do not ignore entries starting with \(aq.\(aq
.BR dir (1)
"""


def test_html():
    text = extract("a/page.html", PAGE)
    assert text == "Big & bold\n\nOne two.\n\n- first\n- second\n\na\n  b\n"


def test_man_page():
    text = extract("ls.1.gz", gzip.compress(MAN.encode()))
    assert text == (
        "NAME\n\nls - list\n\nSYNOPSIS\n\nls\n[OPTION]...\n\n-a, --all\n"
        "do not ignore entries starting with '.'\ndir(1)\n"
    )
    assert extract("notes.1", b"plain text, no roff") == "plain text, no roff"


def test_plain_text_loses_its_carriage_returns_and_mark():
    assert extract("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree") == "one\ntwo\nthree"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"MZ\0\1\2", "binary"),
        ("a.txt", b"caf\xe9 \xff", "broken_utf8"),
        ("a.txt", b"a" * (MAX_BYTES + 1), "too_large"),
        ("bomb.gz", gzip.compress(b"0" * (MAX_BYTES + 1), mtime=0), "too_large"),
        ("torn.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], "bad_gzip"),
        ("false.gz", b"not gzip", "bad_gzip"),
    ],
)
def test_what_can_not_be_text(name, data, reason):
    with pytest.raises(Unreadable, match=reason):
        extract(name, data)
