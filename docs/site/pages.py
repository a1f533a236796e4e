"""Pages of the site that do not lie in docs/ (mkdocs calls the functions named `on_...`).

The README is the front page. The documents link to files as a code host shows them, relative to their own folder. Here
a link leads to the page made of that file. Examples that are linked become pages with their text; a link to a folder
becomes plain text, because the site has no page for it.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import gasp_fast

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".cff": "yaml"}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
REMARK = re.compile(r"^<!-- (?:not run|from): .* -->\n", re.MULTILINE)  # for the test of the documents


def on_config(config: MkDocsConfig) -> None:
    config.copyright = f"gasp_fast {gasp_fast.__version__}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    names = "\n\n".join(f"::: gasp_fast.{name}" for name in gasp_fast.__all__)
    files.append(File.generated(config, "reference.md", content=f"# Python reference\n\n{names}\n"))
    documents = [ROOT / name for name in PAGES] + [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    for document in filter(Path.is_file, documents):
        for _, target, _ in LINK.findall(document.read_text()):
            path = Path(os.path.normpath(document.parent / target))
            if path.is_file() and path.suffix in LANGUAGES and files.get_file_from_path(uri_of(path)) is None:
                text = f"# {path.relative_to(ROOT)}\n\n```{LANGUAGES[path.suffix]}\n{path.read_text()}```\n"
                # reached by links, not from the navigation
                files.append(File.generated(config, uri_of(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    home = {uri: name for name, uri in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def lead_to_a_page(link: re.Match[str]) -> str:
        text, target, anchor = link.groups(default="")
        path = Path(os.path.normpath((ROOT / home).parent / target))
        if path.is_dir():
            return text
        if not path.is_file():  # another site, or nothing: mkdocs reports the latter
            return link[0]
        return f"[{text}]({os.path.relpath(uri_of(path), Path(page.file.src_uri).parent)}{anchor})"

    return LINK.sub(lead_to_a_page, REMARK.sub("", markdown))


def uri_of(path: Path) -> str:
    """The page of a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    return PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"{name}.md")
