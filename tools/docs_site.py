"""Hooks of mkdocs for the site of the documents (mkdocs.yml, `make docs`).

The documents are written for the repository, and their links lead to its files. The site adds
pages:

- index.md: README.md;
- api/: the reference, a page for each public module, from its docstrings;
- notebooks/: the notebooks of docs/notebooks, as Markdown;
- repository/: every file or folder outside docs/ that a page links to.

Links are rewritten to lead to these pages. Pages that mkdocs.yml's `nav` does not name are listed
at its end.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def public_modules() -> list[str]:
    """The modules of the reference: packages with an `__all__`, adapters of other libraries, and
    two modules that users call."""
    package = ROOT / "torchext"
    files = [path for path in package.rglob("__init__.py") if "__all__" in path.read_text()]
    files += (package / "integrations").glob("[a-z]*.py")
    files += (package / "gemm_selection.py", package / "reference.py")
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)
    modules = {
        name.removesuffix(".__init__")
        for name in names
        if "._" not in name.removesuffix(".__init__")
    }
    hidden = {"torchext.compat"} | {name for name in modules if "deep_gemm." in name}
    return sorted(modules - hidden, key=lambda name: ("integrations" in name, name))


API = public_modules()
# Modules whose functions have the signatures of other modules' functions, which describe them.
SHORT = ("torchext.compat.deep_gemm", "torchext.reference")
LANGUAGES = {
    ".cu": "cuda", ".cuh": "cuda", ".cpp": "cpp", ".h": "cpp", ".inc": "cpp", ".py": "python",
    ".ptx": "ptx", ".toml": "toml", ".json": "json",
}  # fmt: skip
# Too long and too uniform to be worth the time of the search index.
UNSEARCHED = ("sass_report.md",)
_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s]+)(?P<after>#[^)\s]*)?(?=[)\s])")
_FENCE = re.compile(r"^ *(```+|~~~+)")
_CONTINUED = re.compile(r" {2,3}\S")
_ITEM = re.compile(r"(?:[-*+]|\d+\.) ")
_PARAGRAPH = re.compile(r"(?!(?:[-*+]|\d+\.) )\S")


def page_of(path: str) -> str:
    """The site's page for a file or folder of the repository, both as paths from their roots."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/").removesuffix(".ipynb") + (
            ".md" if path.endswith(".ipynb") else ""
        )
    module = path.removesuffix("/__init__.py").replace("/", ".")
    if module in API:
        return f"api/{module}.md"
    page = "repository/" + path
    return page if path.endswith(".md") else page + ".md"


def _outside_code(text: str) -> Iterator[tuple[str, bool]]:
    """(line, whether it belongs to a fenced block) of each line."""
    fence = ""
    for line in text.splitlines():
        match = _FENCE.match(line)
        if fence:
            yield line, True
            if match and match[1].startswith(fence) and not line.strip(" `~"):
                fence = ""
        else:
            fence = match[1] if match else ""
            yield line, bool(match)


def links(text: str) -> list[str]:
    """The relative targets of a document's links, without fragments."""
    return [
        match["target"]
        for line, code in _outside_code(text)
        if not code
        for match in _LINK.finditer(line)
        if "://" not in match["target"] and not match["target"].startswith("mailto:")
    ]


def resolve(path: str, target: str) -> str:
    """The path, from the root, that a link in the file `path` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def for_site(text: str, path: str, page: str) -> str:
    """A document's text with links between pages, and lists as Python-Markdown wants them: a blank
    line before, and four spaces before what belongs to an item. path: the document's; page: that
    of the site."""
    lines: list[str] = []
    previous = ""

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        to = page_of(resolve(path, target))
        return "](" + posixpath.relpath(to, posixpath.dirname(page)) + (match["after"] or "")

    for line, code in _outside_code(text):
        if code:
            lines.append(line)
        else:
            if _ITEM.match(line) and _PARAGRAPH.match(previous):
                lines.append("")
            indent = "  " if _CONTINUED.match(line) else ""
            lines.append(indent + _LINK.sub(rewritten, line))
        previous = line
    return "\n".join(lines) + "\n"


def page_text(path: str) -> str:
    """The Markdown of a file or folder of the repository."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir() if not entry.name.startswith("__"))
        listed = "\n".join(f"- `{name}`" for name in names)
        return f"# {path}/\n\n{listed}\n"
    text = file.read_text()
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        return notebook_text(json.loads(text))
    language = LANGUAGES.get(file.suffix, "text")
    return f"# {path}\n\n`````{language}\n{text.rstrip()}\n`````\n"


def notebook_text(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its text, code and printed output, and pictures as data URIs."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append("```text\n" + "".join(output["text"]).rstrip("\n") + "\n```")
            elif "image/png" in output["data"]:
                picture = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f"![](data:image/png;base64,{picture})")
            else:
                text = "".join(output["data"]["text/plain"])
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def api_text(module: str) -> str:
    text = f"# {module}\n\n::: {module}\n"
    if module in SHORT:  # separate signatures are formatted by ruff, a process for each function
        text += "    options:\n      separate_signature: false\n"
    return text


def documents() -> list[str]:
    """The documents in docs/, from the root."""
    found = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def added_files() -> list[str]:
    """README.md, and the files and folders outside docs/ that pages lead to."""
    found: dict[str, None] = {"README.md": None}
    queue = [*documents(), "README.md"]
    while queue:
        path = queue.pop()
        if not path.endswith((".md", ".ipynb")):
            continue
        for target in links(page_text(path)):
            to = resolve(path, target)
            page = page_of(to)
            if page.startswith("repository/") and to not in found and (ROOT / to).exists():
                found[to] = None
                queue.append(to)
    return list(found)


# ---- called by mkdocs ----

_paths: dict[str, str] = {}  # {page: its document's path}


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(item)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.watch.extend(str(ROOT / name) for name in ("torchext", "README.md"))
    api = [{module: f"api/{module}.md"} for module in API]
    assert isinstance(config.nav, list)
    for item in config.nav:
        if item == {"API": "api"}:
            item["API"] = api
    named = set(_named(config.nav))
    more = [page for page in map(page_of, documents()) if page not in named]
    if more:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    _paths.clear()
    for path in documents():
        _paths[page_of(path)] = path
        if path.endswith(".ipynb"):
            file = files.get_file_from_path(path.removeprefix("docs/"))
            if file:
                files.remove(file)
            files.append(File.generated(config, page_of(path), content=page_text(path)))
    for path in added_files():
        _paths[page_of(path)] = path
        files.append(File.generated(config, page_of(path), content=page_text(path)))
    for module in API:
        files.append(File.generated(config, f"api/{module}.md", content=api_text(module)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri.startswith("repository/") or page.file.src_uri in UNSEARCHED:
        page.meta["search"] = {"exclude": True}
    path = _paths.get(page.file.src_uri)
    return for_site(markdown, path, page.file.src_uri) if path else markdown
