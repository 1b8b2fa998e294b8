"""A page as a reader's browser takes it apart."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects tags, links, images with their alternatives, headings, tables and text; fails where tags do not nest.

    A table is {"caption": text, "heads": [(text, scope)]}.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images, self.alts, self.links, self.ids = [], [], [], []
        self.words, self.headings = [], []
        self.tables: list[dict] = []
        self.feed(text)
        assert not self.open
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(found["src"])
            self.alts.append(found["alt"])
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        if tag == "table":
            self.tables.append({"caption": "", "heads": []})
        if tag == "th":
            self.tables[-1]["heads"].append(["", found.get("scope")])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open or "script" in self.open:
            return
        self.words.append(data)
        if "h2" in self.open:
            self.headings.append(data)
        if "caption" in self.open:
            self.tables[-1]["caption"] += data
        if "th" in self.open:
            self.tables[-1]["heads"][-1][0] += data
