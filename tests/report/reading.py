"""A page as a reader of HTML has it, without a browser."""

import json
from html.parser import HTMLParser

#: Elements that have no end.
VOID = {"meta", "img", "link", "br", "input"}


class Page(HTMLParser):
    """What is on a page: elements with attributes, text, cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.open, self.rows, self.scripts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += text
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(text)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def figures(self):
        """Names of the figures that the page draws."""
        return [item["target_id"].removeprefix("figure-") for item in json.loads(self.scripts[0])["items"]]

    @property
    def headings(self):
        return [attributes["id"] for name, attributes in self.elements if name == "h2"]
