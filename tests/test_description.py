"""The description on a package index has no dead link: links are absolute, or plain text without an address."""

import email
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
URL = "https://host.example/owner/lion_hf"


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("lion_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = {
    "link": ("See [uses](docs/uses.md#onnx).", f"See [uses]({URL}/blob/main/docs/uses.md#onnx).", "See uses."),
    "broken line": ("[two\nwords](./a.md)", f"[two\nwords]({URL}/blob/main/a.md)", "two\nwords"),
    "code as text": ("[`push`](docs/x.md)", f"[`push`]({URL}/blob/main/docs/x.md)", "`push`"),
    "heading": ("[Limits](#limits)", f"[Limits]({URL}/blob/main/README.md#limits)", "Limits"),
    "picture": ("a\n\n![masks](docs/m.png)\n\nb", f"a\n\n![masks]({URL}/raw/main/docs/m.png)\n\nb", "a\n\nb"),
    "linked picture": (
        "[![m](docs/m.png)](docs/v.md)",
        f"[![m]({URL}/raw/main/docs/m.png)]({URL}/blob/main/docs/v.md)",
        "",
    ),
    "title": ('[a](b.md "c d")', f'[a]({URL}/blob/main/b.md "c d")', "a"),
    "absolute": ("[a](https://x.org) ![b](https://x.org/b.png)",) * 3,
    "code": ("`[a](b.md)` and `x` [c](https://x.org)",) * 3,
    "block": ("```python\n[a](b.md)\n```\n",) * 3,
}


@pytest.mark.parametrize("readme, with_url, without", CASES.values(), ids=CASES)
def test_relative_links_become_absolute_or_text(setup, readme, with_url, without):
    assert setup.description(readme, URL) == setup.description(readme, f"{URL}/") == with_url
    assert setup.description(readme, None) == without


@pytest.mark.parametrize("readme", ['<img src="docs/m.png">', "<a href='a.md'>a</a>", "[a]\n\n[a]: docs/a.md"])
def test_links_that_cannot_be_rewritten_stop_the_build(setup, readme):
    with pytest.raises(ValueError, match=r"write \[text\]"):
        setup.description(readme, URL)
    assert setup.description(re.sub("docs/m.png|docs/a.md|a.md", "https://x.org", readme), URL)


def links(text):
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)", prose)


@pytest.mark.parametrize("url", [URL, None])
def test_the_readme_has_no_relative_link_on_an_index(setup, url):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(setup.is_relative(target) for target in links(readme))
    described = setup.description(readme, url)
    assert not [target for target in links(described) if setup.is_relative(target)]
    for target in links(described) if url else []:
        if target.startswith(URL):
            assert (ROOT / re.sub(rf"{URL}/(blob|raw)/main/|#.*", "", target)).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("url", [URL, None])
def test_the_metadata_of_the_package_holds_the_description(setup, url, tmp_path):
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "src" / "lion_hf"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    lines = (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("url =")]
    lines.insert(lines.index("[metadata]") + 1, f"url = {url}" if url else "")
    (tmp_path / "setup.cfg").write_text("\n".join(lines) + "\n", encoding="utf-8")
    build = "from setuptools.build_meta import prepare_metadata_for_build_wheel as p; p('out')"
    subprocess.run([sys.executable, "-c", f"import os; os.mkdir('out'); {build}"], cwd=tmp_path, check=True)
    (file,) = (tmp_path / "out").glob("*.dist-info/METADATA")
    metadata = email.message_from_bytes(file.read_bytes())
    assert metadata["Description-Content-Type"] == "text/markdown" and metadata["Name"] == "lion-hf"
    described = metadata.get_payload(decode=True).decode()
    assert described.strip() == setup.description((ROOT / "README.md").read_text(encoding="utf-8"), url).strip()
    assert (f"]({URL}/raw/main/docs/masks.png)" in described) == (url is not None)
