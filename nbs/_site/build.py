"""Make the site: README, all notebooks with their outputs, and an API reference. `make docs` runs this.

Pages are written into build/pages as Markdown, then mkdocs makes build/site of them. Nothing is fetched: formulas
become MathML while the site is built, and the theme brings its own style.
"""

import configparser
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbdev.showdoc import BasicMarkdownRenderer

ROOT = Path(__file__).resolve().parents[2]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
CHAPTERS = {"The method": "[0-5]*", "Measuring": "6*", "Experiments": "7*", "Foundations": "9*"}
COLAB = """[Open in Colab](https://colab.research.google.com/github/{project}/blob/{branch}/nbs/{page}){{ .md-button }}

<details markdown="1"><summary>What to run first on Colab</summary>
A page needs the package and the files beside it. Put these lines into a cell of their own, above all others:

```
!git clone --depth 1 --branch {branch} {address} /content/advdpnp
%cd /content/advdpnp/nbs
%pip install --quiet ..
```

</details>"""  # under the title of a notebook
OWN_PAGES = ("evaluate_your_model", "cluster", "promises")  # beside the chapters, where they exist


def shown(cell):
    "A cell as a reader sees it; None if there is nothing to see."
    lines = cell.source.splitlines()
    directives = [line for line in lines if line.startswith("#| ")]
    if cell.cell_type == "code":
        if any("hide" in line or "default_exp" in line for line in directives):
            return None
        cell.source = "\n".join(line for line in lines if line not in directives).strip()
        if "output-only" in cell.metadata.get("tags", []):
            cell.source = ""
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        return cell if cell.source or cell.outputs else None
    cell.source = re.sub(r"(?m)^(?!\s*(?:[-|*>#]|\d+\.))(.+)\n(?=(?:- |\d+\. |\|))", r"\1\n\n", cell.source)
    return cell


def local(match):
    "A link of a notebook as one of the site; files of the data folder are taken along."
    target, _, anchor = match[1].partition("#")
    anchor = f"#{anchor}" if anchor else ""
    if target.endswith(".ipynb"):
        return f"]({Path(target).stem}.md{anchor})"
    source = (ROOT / "nbs" / target).resolve()
    if target.startswith("../data/") and source.is_file():
        copy = PAGES / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
        return f"]({source.relative_to(ROOT)})"
    return match[0]


def colab(path):
    "The link that opens a notebook in Colab, which reads GitHub alone; empty while settings.ini has no such git_url."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    address, branch = settings["DEFAULT"]["git_url"].rstrip("/").removesuffix(".git"), settings["DEFAULT"]["branch"]
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", address)
    return COLAB.format(project=found[1], branch=branch, page=path.name, address=address) if found else ""


def write_page(path):
    "A notebook as a page."
    page = nbformat.read(path, 4)
    page.metadata.language_info = {"name": "python"}
    page.cells = [cell for cell in map(shown, page.cells) if cell is not None]
    body, found = MarkdownExporter().from_notebook_node(
        page, {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"})
    for name, data in found["outputs"].items():
        (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / name).write_bytes(data)
    body = re.sub(r"<style scoped>.*?</style>", "", body, flags=re.S)
    body = re.sub(r"\[([^][]*)\]\(\.\./data/(?:results|weights|reported)/?\)", r"\1", body)  # no page shows a folder
    body = re.sub(r"\]\(((?!https?:|#)[^)\s]+)\)", local, body)
    body = re.sub(r"!\[(?:png|svg|jpeg)\]", "![a picture, described beside it]", body)
    body = re.sub(r"\A\s*# .+\n", lambda title: f"{title[0]}\n{colab(path)}\n", body)
    (PAGES / f"{path.stem}.md").write_text(body)


def members(thing):
    "Public methods of a class that have a docstring, in order."
    for name, value in vars(thing).items():
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(value) and value.__doc__:
            yield value


def described(thing, level):
    "Signature with its comments, and docstring."
    text = BasicMarkdownRenderer(thing, name=thing.__qualname__, title_level=level)._repr_markdown_()
    return re.sub(r"\A---\n+|\[source\]\([^)]*\)\{[^}]*\}\n*", "", text).strip()


def write_api(notebook):
    "The reference of a module."
    module = importlib.import_module(f"advdpnp.{notebook.stem.split('_', 1)[1]}")
    parts = [f"# advdpnp.{module.__name__.split('.')[1]}", module.__doc__ or "",
             f"Explained and tried in [{notebook.stem}](../{notebook.stem}.md)."]
    for name in module.__all__:
        thing = getattr(module, name)
        if getattr(thing, "__module__", None) != module.__name__ or not callable(thing):
            continue
        parts.append(described(thing, 2))
        if inspect.isclass(thing):
            parts += [described(member, 3) for member in members(thing)]
    path = PAGES / "api" / f"{module.__name__.split('.')[1]}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")
    return f"api/{path.name}"


def contents(notebooks):
    "The table of contents."
    nav = [{"Start": "index.md"}]
    have = {path.stem for path in notebooks}
    for chapter, pattern in CHAPTERS.items():
        nav.append({chapter: [f"{path.stem}.md" for path in sorted((ROOT / "nbs").glob(f"{pattern}.ipynb"))
                              if path.stem[0].isdigit()]})
    nav[2]["Measuring"] = [f"{name}.md" for name in OWN_PAGES if name in have] + nav[2]["Measuring"]
    results = [path.stem for path in notebooks if re.match("results|table|figure|benchmark", path.stem)]
    nav.append({"Results": [f"{stem}.md" for stem in sorted(results, key=lambda s: (s != "results", s))]})
    nav.append({"Reference": [
        {chapter: [write_api(path) for path in sorted((ROOT / "nbs").glob(f"{pattern}.ipynb"))
                   if path.stem[0].isdigit() and path.stem != "00_method"]} for chapter, pattern in CHAPTERS.items()]})
    return nav


def main():
    "Write the pages, and make the site."
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    notebooks = sorted((ROOT / "nbs").glob("*.ipynb"))
    for path in notebooks:
        write_page(path)
    shutil.copy(Path(__file__).with_name("extra.css"), PAGES)
    settings = yaml.unsafe_load(Path(__file__).with_name("mkdocs.yml").read_text())
    settings |= dict(docs_dir=str(PAGES), site_dir=str(SITE), nav=contents(notebooks),
                     hooks=[str(Path(__file__).with_name("formulas.py"))])
    config = ROOT / "build" / "mkdocs.yml"
    config.write_text(yaml.dump(settings))
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", config], check=True,
                   env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    print(SITE / "index.html")


if __name__ == "__main__":
    main()
