"""Writes README.md from nbs/index.ipynb: hidden cells left out, pictures kept in nbs/images/, links made to work from the top folder."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

TOP = Path(__file__).resolve().parent.parent
IMAGES = TOP / "nbs" / "images"
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
HIDDEN_INPUT = re.compile(r"^#\|\s*(hide_input|echo:\s*false)", re.MULTILINE)


def shown(cell: nbformat.NotebookNode) -> bool:
    """Whether a reader of the README sees the cell."""
    return cell.cell_type == "markdown" or not re.search(r"^#\|\s*(hide\s*$|default_exp\b)", cell.source, re.MULTILINE)


def from_top(link: str) -> str:
    """A link as written in nbs/index.ipynb, as it must read in the folder above."""
    if re.match(r"[a-z]+:|#|/", link): return link
    return link.removeprefix("../") if link.startswith("../") else f"nbs/{link}"


def main() -> None:
    notebook = nbformat.read(TOP / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it, and code fences need it
    notebook.cells = [cell for cell in notebook.cells if shown(cell)]
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        if HIDDEN_INPUT.search(cell.source): cell.metadata["transient"] = {"remove_source": True}
        cell.source = DIRECTIVE.sub("", cell.source)
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": "index", "output_files_dir": "images"})
    text = re.sub(r"(\]\(|\b(?:src|href)=\")([^)\s\"]+)", lambda m: m[1] + from_top(m[2]), text)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip() + "\n"
    wanted = {Path(name).name: data for name, data in resources["outputs"].items()}
    for old in IMAGES.glob("index_*"):
        if old.name not in wanted: old.unlink()
    for name, data in wanted.items():
        IMAGES.mkdir(exist_ok=True)
        (IMAGES / name).write_bytes(data)
    (TOP / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text.splitlines())} lines, {len(wanted)} pictures of nbs/index.ipynb's cells in nbs/images/")


if __name__ == "__main__": main()
