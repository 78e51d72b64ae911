"""A hook of mkdocs: README.md is the home page, and files outside docs/ that pages link to are part of the site.

The documents are written for the repository, where `../examples/ddp.py` is a file. On the site it is
`repository/examples/ddp.py.md`, a page that shows the file; Markdown files are rendered, pictures are copied.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
COPIED = (".png", ".svg")


def in_site(path: Path) -> str:
    """Where a file or folder of the repository is in the site's sources."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"repository/{name}" + ("" if path.suffix in (".md", *COPIED) else ".md")


def rewritten(text: str, path: Path, linked: set[Path]) -> str:
    """A document's text with the links of the site; adds the files it links to."""

    def replace(link: re.Match[str]) -> str:
        target = (path.parent / link[2]).resolve()
        if "://" in link[2] or not target.exists():
            return link[0]
        linked.add(target)
        place = os.path.relpath(in_site(target), Path(in_site(path)).parent)
        return link[1] + Path(place).as_posix() + link[3]

    blocks = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(block if block.startswith("```") else LINK.sub(replace, block) for block in blocks)


def page(path: Path, linked: set[Path]) -> str:
    """The Markdown that shows a file or a folder of the repository."""
    if path.suffix == ".md":
        return rewritten(path.read_text(encoding="utf-8"), path, linked)
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        entries = sorted(item.name for item in path.iterdir() if not item.name.startswith((".", "__")))
        return f"# {name}/\n\n" + "\n".join(f"- `{entry}`" for entry in entries) + "\n"
    language = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}.get(path.suffix, "text")
    return f"# {name}\n\n````{language}\n{path.read_text(encoding='utf-8')}````\n"


def on_files(files: Files, config: Any) -> Files:
    """Add README.md, and what the documents link to outside docs/."""
    queue, done = [ROOT / "README.md"], set[Path]()
    for file in files.documentation_pages():
        if file.src_uri.endswith(".md"):
            page(ROOT / "docs" / file.src_uri, found := set())
            queue += sorted(found)
    while queue:
        path = queue.pop()
        if path in done or path.is_relative_to(ROOT / "docs"):
            continue
        done.add(path)
        if path.suffix in COPIED:
            files.append(File.generated(config, in_site(path), abs_src_path=str(path)))
        else:
            files.append(File.generated(config, in_site(path), content=page(path, found := set())))
            queue += sorted(found)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a document in docs/."""
    if page.file.generated_by:
        return markdown
    return rewritten(markdown, ROOT / "docs" / page.file.src_uri, set())


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a notebook, which mkdocs-jupyter leaves as they are."""
    path = ROOT / "docs" / page.file.src_uri
    if path.suffix != ".ipynb":
        return output

    def replace(link: re.Match[str]) -> str:
        target = in_site((path.parent / link[1]).resolve())
        return f'href="{os.path.relpath(Path(target).with_suffix(".html"), Path(page.file.src_uri).parent)}'

    return re.sub(r'href="((?!\w+:)[^"#]+\.md)', replace, output)
