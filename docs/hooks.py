"""What mkdocs.yml cannot say: the README is the first page, and linked files come along.

The pages link to files of the repository by relative paths, which work there. The site has each
such file under ``repository/``, as a page or, if it is data, as it is, and its links lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml", ".sh": "sh", "": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, and every file outside docs/ that a page links to."""
    names = ["README.md", *(f"docs/{page.src_uri}" for page in files.documentation_pages())]
    for name in names:  # to which the files that these link to are added
        path = ROOT / name
        if path.suffix == ".md":
            links = LINK.findall(path.read_text(encoding="utf-8"))
            names += sorted({_target(name, link) for link in links} - {*names})
        uri = _on_the_site(name)
        if not path.is_file() or uri in files.src_uris:
            continue
        if path.suffix in LANGUAGES:
            code = path.read_text(encoding="utf-8")
            page = f"# {path.name}\n\n`{name}`\n\n````{LANGUAGES[path.suffix]}\n{code}````\n"
            files.append(File.generated(config, uri, content=page))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change the links of a page that is also one of the repository."""
    uri = page.file.src_uri
    name = "README.md" if uri == "index.md" else uri.removeprefix("repository/")
    if name == uri:
        name = f"docs/{uri}"
    if _on_the_site(name) != uri:  # code
        return markdown
    folder = posixpath.dirname(uri) or "."

    def changed(link: re.Match[str]) -> str:
        target = _target(name, link[0])
        return posixpath.relpath(_on_the_site(target), folder)

    return LINK.sub(changed, markdown)


def _target(name: str, link: str) -> str:
    """The file of the repository that a link in the file ``name`` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), link))


def _on_the_site(name: str) -> str:
    """Where a file of the repository is on the site."""
    if name == "README.md":
        return "index.md"
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    suffix = ".md" if posixpath.splitext(name)[1] in LANGUAGES else ""
    return f"repository/{name}{suffix}"
