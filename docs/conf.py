"""The site that `make docs` builds: the pages of the repository in their places, and the API from the docstrings.

The source folder is the root of the repository, so that links between pages, and from pages to files, are the same on
a code host and in the site.
"""

import html
import re
import shutil
import sys
from os.path import normpath
from pathlib import Path

from docutils import nodes
from sphinx import addnodes


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import lion_hf


project = "lion_hf"
author = "the lion_hf contributors"
version = release = lion_hf.__version__
copyright = author

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "model_cards/*.md", "examples/**.md"]
exclude_patterns = [".*", "build", "dist", "outputs", "src", "tests", "model_cards/*template.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
# Cards and the pages for contributors are linked from other pages and stand in no table of contents.
suppress_warnings = ["toc.not_included"]

# ---------------------------------------------------------------------------------------------------------- the pages
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
highlight_language = "none"
copybutton_prompt_text = "$ "

CONTENTS = """

```{toctree}
:hidden:
:caption: Use it

getting-started
training
uses
checkpoints
linearize
questions
```

```{toctree}
:hidden:
:caption: How it works

variants
operator
formats
behaviour
extending
migration
```

```{toctree}
:hidden:
:caption: Measured

results
benchmarks
../model_cards/README
```

```{toctree}
:hidden:
:caption: Reference

api/index
../CHANGELOG
../CONTRIBUTING
../README
```
"""

# ------------------------------------------------------------------------------------------------------------ the API
default_role = "literal"
napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # the methods of this project, not those that Transformers documents
maximum_signature_line_length = 88

# Paragraphs that Transformers adds to the docstrings of all models, in its own Markdown.
BOILERPLATE = (
    r"This model inherits from \[`PreTrainedModel`\].*?\n\s*\n",
    r"This model is also a PyTorch \[torch\.nn\.Module\].*?\n\s*\n",
    r"The \[`\w+`\] forward method, overrides.*?\n\s*\n",
    r"<Tip>.*?</Tip>",
    r" *\[What are [^\]]*\]\([^)]*\)",
)


def as_rst(app, what, name, thing, options, lines):
    """Docstrings as reStructuredText: links to names are code, fences are code blocks."""
    text = "\n".join(lines) + "\n"
    for pattern in BOILERPLATE:
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r"\[?\[`~?([^`]+?)\]?`\]\]?(\([^)]*\))?", lambda found: f"`{found[1].split('.')[-1]}`", text)
    fence = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    text = fence.sub(
        lambda found: f"{found[1]}.. code-block:: {found[2]}\n\n" + re.sub(r"(?m)^(?=.)", "   ", found[3]), text
    )
    lines[:] = text.split("\n")


# ----------------------------------------------------------------------------------------------------------- the site
html_theme = "furo"
html_title = f"lion_hf {release}"
html_copy_source = False
html_show_sourcelink = False


def link_files(app, doctree):
    """Links to folders, and to Markdown files that are no pages: what MyST takes for missing pages."""
    page = Path(app.env.docname).parent
    for node in list(doctree.findall(addnodes.pending_xref)):
        target = node["reftarget"] + ".md" * (node.get("refdomain") == "doc")
        path = normpath(page / target if node.get("refdomain") != "doc" else target)
        if node.get("reftype") != "myst" and node.get("refdomain") != "doc":
            continue
        if (ROOT / path).is_dir():
            app.env.linked_folders.add(path)
            address = f"{node['reftarget'].rstrip('/')}/index.html"
        elif (ROOT / path).is_file() and path.removesuffix(".md") not in app.env.found_docs:
            app.env.linked_files.add(path)
            address = "../" * len(page.parts) + path
        else:
            continue
        text = nodes.inline("", "", *node.children)
        node.replace_self(nodes.reference("", "", *text.children, refuri=address, internal=True))


def begin(app, env, _):
    env.linked_folders, env.linked_files = set(), set()


FILES = {".py", ".md", ".yaml", ".json", ".png", ".txt", ".patch", ".ipynb"}


def list_folders(app):
    """A page for each folder that is linked, with links to its files."""
    for folder in sorted(app.env.linked_folders):
        files = [
            file for file in sorted((ROOT / folder).rglob("*")) if file.is_file() and "__pycache__" not in file.parts
        ]
        lines = []
        for file in files:
            name = file.relative_to(ROOT / folder).as_posix()
            is_page = f"{folder}/{name.removesuffix('.md')}" in app.env.found_docs
            if not is_page:
                app.env.linked_files.add(f"{folder}/{name}")
            address = f"{name.removesuffix('.md')}.html" if is_page else name
            lines.append(f'<li><a href="{html.escape(address)}"><code>{html.escape(name)}</code></a></li>')
        body = f"<h1>{html.escape(folder)}</h1>\n<ul>\n" + "\n".join(lines) + "\n</ul>\n"
        yield f"{folder}/index", {"title": folder, "body": body}, "page.html"


def copy_files(app, error):
    if error:
        return
    for path in app.env.linked_files:
        target = Path(app.outdir, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, target)
    first = f'<!doctype html><title>{project}</title><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
    Path(app.outdir, "index.html").write_text(first, encoding="utf-8")


def add_contents(app, docname, source):
    if docname == root_doc:
        source[0] += CONTENTS


def setup(app):
    app.connect("env-before-read-docs", begin)
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # before napoleon
    app.connect("source-read", add_contents)
    app.connect("doctree-read", link_files)
    app.connect("html-collect-pages", list_folders)
    app.connect("build-finished", copy_files)
