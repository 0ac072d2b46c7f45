"""Hooks of MkDocs, which `mkdocs.yml` names: links out of docs/, and names with underscores.

A page may link to any file of the repository. In a checkout such links lead to the files. The site
has no address of the repository, so there an image is copied into the site and any other link keeps
its text alone.
"""

import posixpath
import re
from pathlib import Path

from markdown import Extension
from markdown.inlinepatterns import SimpleTextInlineProcessor
from mkdocs.structure.files import File

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


class UnderscoresStay(Extension):
    """Only asterisks emphasise: in docstrings underscores belong to names, such as K_{i-1}."""

    def extendMarkdown(self, md):
        """Register the pattern; called by Markdown."""
        # Before emphasis (60), after links and HTML.
        md.inlinePatterns.register(SimpleTextInlineProcessor("(_)"), "underscore", 65)


def on_config(config):
    """Add the extension; called by MkDocs once."""
    config.markdown_extensions.append(UnderscoresStay())
    return config


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Rewrite the links of one page; called by MkDocs before it renders the page."""
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(link: re.Match) -> str:
        is_image, text, target = link[1], link[2], link[3]
        path = posixpath.normpath(posixpath.join(folder, target))
        if not path.startswith("../"):
            return link[0]  # a page or image of docs/
        if not is_image:
            return text
        source = Path(config.docs_dir, path)
        place = f"images/repository/{source.name}"
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(source)))
        return f"![{text}]({posixpath.relpath(place, folder or '.')})"

    return _LINK.sub(rewritten, markdown)
