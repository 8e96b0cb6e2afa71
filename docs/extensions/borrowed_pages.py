"""Pages of the site that stand elsewhere in the repository, and links that work in both places.

A page is written for whoever reads it on GitHub, with links relative to its own folder. Before the
site is built the borrowed ones are copied beside its own pages, and in all of them a link to
another page leads to that page in the site, and one to any other file into the repository, or
nowhere if the site is not told where that is.
"""

import os
import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

# [text](target) and ![text](target)
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")


def copy(app: Sphinx, config) -> None:
    """Brings the pages beside the others."""
    for place, original in config.borrowed_pages.items():
        source, target = Path(app.srcdir).parent / original, Path(app.srcdir, place)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turns links that are relative to where a page was written into links within the site."""
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md":  # notebooks have no links into the repository
        source[0] = rewritten(app, page, source[0])


def rewritten(app: Sphinx, page: Path, text: str) -> str:
    docs = Path(app.srcdir)
    borrowed = {
        (docs.parent / original).resolve(): docs / place
        for place, original in app.config.borrowed_pages.items()
    }
    # Where the page was written; a page of the site itself is where it is.
    written = {place: original for original, place in borrowed.items()}.get(page, page)

    def replacement(found: re.Match) -> str:
        exclamation, label, link = found.groups()
        path, _, anchor = link.partition("#")
        file = (written.parent / path).resolve()
        if (file / "README.md").exists():
            file /= "README.md"
        if not path or ":" in path or not file.exists():  # Sphinx complains about the last
            return f"{exclamation}[{label}]({link})"
        inside = borrowed.get(file, file)
        if inside.is_relative_to(docs) and inside.suffix in (".md", ".ipynb", ".svg", ".png"):
            target = os.path.relpath(inside, page.parent) + (anchor and f"#{anchor}")
            return f"{exclamation}[{label}]({target})"
        repository = app.config.borrowed_pages_repository
        if not repository:
            return label
        return f"[{label}]({repository}/blob/main/{file.relative_to(docs.parent)})"

    return LINK.sub(replacement, text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("borrowed_pages", {}, "env")
    app.add_config_value("borrowed_pages_repository", "", "env")
    app.connect("config-inited", copy)
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
