"""mkdocs hook: links from a page to files of the repository outside docs/.

On the forge such a link opens the file; on the site there is no such page, so the text stays and
the link becomes the file's path. A file that is not there is a warning, an error with --strict.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks")
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Return the page with every link out of docs/ replaced by its text and the file's path."""
    docs = Path(config.docs_dir)
    root = docs.parent.resolve()

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (docs / page.file.src_uri).parent / target
        if not path.exists():
            LOG.warning("%s: link to %s, which does not exist", page.file.src_uri, target)
            return text
        name = path.resolve().relative_to(root).as_posix()
        return f"`{name}`" if text.strip("`") == name else f"{text} (`{name}`)"

    return OUTSIDE.sub(replace, markdown)
