"""docs/training.md has a line for every flag of the scripts, and names no flag that does not exist."""

import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"
# Flags of other programs on the page.
OTHERS = {"nproc_per_node", "config_file", "import", "smoke", "phase", "help"}


@pytest.fixture(scope="module")
def groups():
    """The groups of flags in the help of each script."""
    from lion_hf.training.parsing import _Parser

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import run_glue
        import run_image_classification
        import run_mlm
    finally:
        sys.path.remove(str(ROOT / "examples"))
    scripts = (run_mlm.CLASSES, run_glue.CLASSES, run_image_classification.CLASSES)
    return [{group.title: group._group_actions for group in _Parser(classes)._action_groups} for classes in scripts]


def test_every_flag_of_a_script_is_in_a_table(groups):
    listed = set(re.findall(r"^\| `--(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    own = {
        action.dest
        for script in groups
        for title, actions in script.items()
        if not title.startswith(("positional", "options", "all other"))
        for action in actions
    }
    assert len(own) > 90 and listed == own


def test_the_page_names_only_flags_that_exist(groups):
    known = {action.dest for script in groups for actions in script.values() for action in actions} | OTHERS
    named = set(
        re.findall(r"(?<![\w-])--([a-z][\w-]+)", PAGE.read_text(encoding="utf-8").replace("output-dir", "output_dir"))
    )
    assert len(named) > 90 and named <= known


def test_help_keeps_the_lines_of_examples_and_shows_each_flag_once(groups, capsys):
    from lion_hf.training.arguments import DataArguments, LionTrainingArguments, ModelArguments
    from lion_hf.training.parsing import parse_arguments

    classes = (ModelArguments, DataArguments, LionTrainingArguments)
    with pytest.raises(SystemExit):
        parse_arguments(
            classes, ["--help"], description="A script.\n\n    python one.py\n    python two.py\n", smoke={}
        )
    page = capsys.readouterr().out
    assert "\n    python one.py\n    python two.py\n" in page
    titles = ["model:", "data:", "training:", "all other flags"]
    assert [page.index(f"\n{title}") for title in titles] == sorted(page.index(f"\n{title}") for title in titles)
    assert page.index("--output_dir") < page.index("\nall other flags") < page.index("--torch_compile")
    flags = re.findall(r"^  (--\w+)", page, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 90 and "--output-dir" not in page.partition("\nmodel:")[2]
    assert "Steps between two logged losses. (default: 20)" in " ".join(page.split())


def test_the_table_names_every_variant():
    from lion_hf.nn.variants import VARIANTS

    row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `--mask_type` |"))
    assert all(f"{name} ({cls.label})" in row for name, cls in VARIANTS.items() if cls.__module__.startswith("lion_hf"))
