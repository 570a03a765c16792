"""A hook of mkdocs that copies files outside docs/ to the site if a page links to them.

So these links work on GitHub and on the site.
"""

import re
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\(\.\./([^)#\s]+)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to `../PATH` at a copy of that file. If there is no such file, mkdocs reports the link."""
    root = Path(config.docs_dir).parent

    def copied(link: re.Match[str]) -> str:
        source, target = root / link[1], f"repository/{link[1]}"
        if not source.is_file():
            return link[0]
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(source)))
        return f"]({relpath(target, Path(page.file.src_uri).parent.as_posix())}"

    return LINK.sub(copied, markdown)
