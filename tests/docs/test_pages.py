"""Every page of the project: its code runs and prints what the page shows, its links lead somewhere, and its commands
name scripts, targets and flags that exist."""

import argparse
import ast
import builtins
import configparser
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy
import pytest
import torch
from pages import EXTRAS, ROOT, blocks_of, check_output, commands, commands_of, dead_links, run, split

import lion_hf.convert.command
import lion_hf.linearize.command
from lion_hf.nn.variants import VARIANTS
from lion_hf.training.errors import UserError


def found(*patterns):
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if "outputs" not in path.parts)


def pages(*patterns, having=lambda page: True):
    named = [(page.relative_to(ROOT).as_posix(), page) for page in found(*patterns)]
    return [pytest.param(page, id=name) for name, page in named if having(page)]


def python(page):
    return blocks_of(page, "python")


READ = ("README.md", "docs/*.md")
COMMANDS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "examples/*.md",
    "examples/recipes/**/*.md",
    "model_cards/README.md",
)
LINKED = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md", "model_cards/*.md")
# Pages whose code reads what their shell blocks train: here these blocks run, too.
TRAINING = {"README.md", "getting-started.md"}


# -------------------------------------------------------------------------------------------------------------- code


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Where a reader begins. The seed is not PyTorch's own, so that a page with random output must set a seed."""
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1234)
    random.seed(1234)
    numpy.random.seed(1234)
    with patch.dict(VARIANTS):  # a page may register one
        yield tmp_path


def run_page(page, folder, blocks):
    namespace = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "bash":
            train(block, page.name)
        elif not block.missing:
            run(block, namespace, page.name)
    outside = [path.name for path in folder.iterdir() if path.name not in ("outputs", "examples")]
    assert not outside, f"{page.name} writes outside of outputs/: {outside}"
    missing = sorted({name for block in blocks for name in block.missing})
    if missing:
        pytest.skip(f"all blocks passed but those that need {', '.join(missing)}")


def train(block, name):
    """Runs the training commands of a shell block as a reader of the checkout would."""
    if not Path("examples").exists():
        Path("examples").symlink_to(ROOT / "examples")
    shown = ""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT / "src")}
    for words in commands(block.code):
        if words[0] == "python" and words[1].startswith("examples/"):
            command = [sys.executable, *words[1:]]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            shown += done.stdout
            assert done.returncode == 0, f"{name}, line {block.line}: {' '.join(words)}\n{done.stdout[-2000:]}"
    if block.output:
        check_output(block.output, shown, f"{name}, line {block.line}")


def quick_blocks(page):
    """Blocks that take no time and need nothing of a block that does."""
    if page.name not in TRAINING:
        return [block for block in python(page) if not block.is_slow]
    kept, known = [], set(dir(builtins))
    for block in python(page):
        bound, loaded = names_of(block.code)
        if "outputs/" not in block.code and loaded <= known | bound:
            kept.append(block)
            known |= bound
    return kept


def names_of(code):
    """The names that code binds, and those that it reads."""
    nodes = [*ast.walk(ast.parse(code))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {alias.asname or alias.name.partition(".")[0] for node in nodes for alias in getattr(node, "names", ())}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return bound, {node.id for node in names if isinstance(node.ctx, ast.Load)}


def needs_time(page):
    return page.name in TRAINING or any(block.is_slow for block in python(page))


@pytest.mark.parametrize("page", pages(*READ, having=quick_blocks))
def test_the_quick_code_of_a_page_runs_and_prints_what_the_page_shows(page, empty_folder):
    run_page(page, empty_folder, quick_blocks(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(*READ, having=needs_time))
def test_all_code_of_a_page_runs_and_prints_what_the_page_shows(page, empty_folder):
    run_page(page, empty_folder, blocks_of(page, "python", *(["bash"] if page.name in TRAINING else [])))


@pytest.mark.parametrize("page", pages(*READ, having=python))
def test_extras_are_named_before_the_code_that_needs_them(page):
    for block in python(page):
        absent = [extra for extra in block.extras.values() if f"lion-hf[{extra}]" not in block.before]
        assert not absent, f"line {block.line} needs lion-hf{absent}, which nothing above names"


@pytest.mark.parametrize(
    "text, message",
    {
        "what is printed is shown": ("```python\nprint(1)\n```\n\n```text\n1\n```\n", None),
        "the comment shows it": ("```python\nprint(1)  # 1\nprint(\n    [2]\n)  # [2]\n```\n", None),
        "dots stand for anything": ("```python\nprint('took 17 s')\n```\n```text\ntook ... s\n```\n", None),
        "a line of dots may stand for none": (
            "```python\nprint(1)\nprint(2)\n```\n```text\n1\n...\n2\n...\n```\n",
            None,
        ),
        "a log is shown": ("```python\nlog('no weights')\n```\n```text\nno weights\n```\n", None),
        "other output": ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "line 2\nExpected:\n    2\nGot:\n    1"),
        "other comment": ("```python\nprint(1)  # 2\n```\n", "Expected:\n    2"),
        "a comment too few": ("```python\nprint(1)  # 1\nprint(2)\n```\n", "Got:\n    1\n    2"),
        "output not shown": ("```python\nprint(1)\n```\nIt prints.\n\n```text\n1\n```\n", "does not show"),
        "a log not shown": ("```python\nlog('no weights')\n```\n", "does not show"),
        "shown but not printed": ("```python\nx = 1\n```\n\n```text\n1\n```\n", "Expected:\n    1\nGot nothing"),
        "dots alone": ("```python\nprint(1)\n```\n\n```text\n...\n```\n", "has no text"),
    }.values(),
    ids=str,
)
def test_a_block_shows_what_it_prints_or_fails(text, message):
    from transformers.utils import logging

    block = split(text)[0][0]
    namespace = {"log": logging.get_logger("lion_hf.page").warning}
    if message is None:
        return run(block, namespace, "page")
    with pytest.raises(AssertionError, match=re.escape(message)):
        run(block, namespace, "page")


def test_files_outside_of_outputs_are_found(empty_folder):
    inside, outside = (split(f"```python\nopen('{name}', 'w').close()\n```\n")[0] for name in ("outputs/a", "b"))
    run_page(empty_folder / "page.md", empty_folder, inside)
    with pytest.raises(AssertionError, match=r"writes outside of outputs/: \['b'\]"):
        run_page(empty_folder / "page.md", empty_folder, outside)


@pytest.mark.slow
def test_training_commands_run_and_their_output_is_compared(empty_folder):
    page = "```bash\npython examples/draw_masks.py --output outputs/m.png\n```\n\n```text\n...wrote {}\n```\n"
    (block, _), _ = split(page.format("outputs/m.png"))
    train(block, "page")
    assert Path("outputs/m.png").is_file()
    (block, _), _ = split(page.format("another"))
    with pytest.raises(AssertionError, match="another"):
        train(block, "page")


# ------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", pages(*LINKED, having=lambda page: "template" not in page.name))
def test_links_lead_to_files_and_headings(page):
    assert not dead_links(page)


def test_dead_links_are_found(tmp_path):
    good = "[a](CONTRIBUTING.md#set-up-test-lint) ![b](docs/masks.png) [c](https://x.org) [d](examples) `[x](no.md)`"
    bad = "[a](nowhere.md) [b](CONTRIBUTING.md#nowhere) ![c](no.png) [d](#no) [e](../outside) [f](setup.cfg#x)"
    page = ROOT / "no-page.md"
    with patch.object(Path, "read_text", autospec=True) as read:
        contributing = "## Set up, test, lint\n```\n# nowhere\n```\n"
        read.side_effect = lambda path, **_: f"# A\n{good}\n{bad}\n" if path == page else contributing
        targets = [target for _, target in re.findall(r"\[(.)\]\((\S+)\)", bad)]
        assert dead_links(page) == targets


# ---------------------------------------------------------------------------------------------------------- commands


class Parsed(BaseException):
    """Ends a script after it has parsed its flags. No Exception, which scripts report."""


def parses(script, words, monkeypatch):
    """Runs a script up to where its flags are parsed; what is wrong with them, if anything."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, *args, **kwargs):
        _, unknown = parse(self, *args, **kwargs)
        raise Parsed(*unknown)

    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    try:
        runpy.run_path(str(script))["main"]()
    except Parsed as parsed:
        return f"{script.name} does not take {' '.join(parsed.args)}" if parsed.args else None
    except SystemExit as stopped:
        return None if stopped.code in (0, None) else f"{script.name} refuses {words}"
    except UserError as error:
        return str(error)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] in EXTRAS:
            return None
        raise
    return f"{script.name} parses no flags"


def problem_of(words, monkeypatch):
    """What is wrong with a command of this project, or None."""
    program = Path(words[0]).name
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"no targets: {unknown}" if unknown else None
    if program in ("pip", "pip3") or words[1:3] == ["-m", "pip"]:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        asked = [name for word in words for names in re.findall(r"\[([\w,-]+)\]", word) for name in names.split(",")]
        unknown = set(asked) - setup["options.extras_require"].keys()
        return f"no extras: {unknown}" if unknown else None
    for name, command in (("convert", lion_hf.convert.command), ("linearize", lion_hf.linearize.command)):
        if program == f"lion-{name}" or words[1:3] == ["-m", f"lion_hf.{name}"]:
            flags = words[1 if program == f"lion-{name}" else 3 :] or ["--help"]
            try:
                command._parser().parse_args(flags)
            except SystemExit as stopped:
                return f"lion-{name} refuses {flags}" if stopped.code else None
            return None
    if words[1:3] == ["-m", "pytest"]:
        absent = [word for word in words[3:] if word.startswith("tests/") and not (ROOT / word.split("::")[0]).exists()]
        return f"no tests: {absent}" if absent else None
    scripts = [
        n for n, word in enumerate(words) if re.match(r"(\./)?(examples|benchmarks|model_cards|docs)/.*\.py$", word)
    ]
    if not scripts:
        return None
    script, flags = ROOT / words[scripts[0]], words[scripts[0] + 1 :]
    if not script.is_file():
        return f"no script {words[scripts[0]]}"
    output = flags[flags.index("--output_dir") + 1] if "--output_dir" in flags[:-1] else "outputs/"
    if not output.startswith(("outputs/", "/tmp/")):
        return f"--output_dir {output} is not below outputs/"
    with monkeypatch.context() as context:
        has_flags = re.search("ArgumentParser|parse_arguments|gpu_options", script.read_text(encoding="utf-8"))
        return parses(script, flags, context) if has_flags else None


@pytest.fixture
def in_checkout(examples, tmp_path, monkeypatch):
    """Commands are read in the checkout, where the recipes are; returns a folder to write to."""
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.mark.parametrize("page", pages(*COMMANDS, having=commands_of))
def test_commands_name_scripts_targets_and_flags_that_exist(page, in_checkout, monkeypatch):
    shown = {}  # files of arguments: a block that begins with their name
    for block in blocks_of(page, "yaml"):
        if named := re.match(r"# (\S+\.yaml)\n", block.code):
            shown[named[1]] = str(in_checkout / "arguments.yaml")
            Path(shown[named[1]]).write_text(block.code, encoding="utf-8")
    problems = []
    for words in commands_of(page):
        problem = problem_of([shown.get(word, word) for word in words], monkeypatch)
        problems += [f"{' '.join(words)}: {problem}"] if problem else []
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "command, problem",
    [
        ("make tests", "no targets"),
        ("pip install 'lion-hf[no]'", "no extras"),
        ("lion-convert a.pth b --cls-token true", "lion-convert refuses"),
        ("lion-linearize a b --text c --layer 1", "lion-linearize refuses"),
        ("python -m pytest tests/no.py", "no tests"),
        ("python examples/run_mln.py --output_dir outputs/a", "no script"),
        ("python examples/run_mlm.py --output_dir mlm", "not below outputs/"),
        ("python examples/run_mlm.py --output_dir outputs/a --epochs 3", "does not take --epochs"),
        (
            "torchrun --nproc_per_node 2 examples/run_glue.py --output_dir=outputs/a --no_flag",
            "does not take --no_flag",
        ),
        ("python benchmarks/bench_ops.py --crossing", "does not take --crossing"),
        ("python examples/draw_masks.py --output", "refuses"),
    ],
)
def test_wrong_commands_are_found(command, problem, in_checkout, monkeypatch, capsys):
    (words,) = commands(command)
    assert problem in (problem_of(words, monkeypatch) or "")


def test_lines_of_a_shell_block_are_commands():
    text = (
        "A=1 make test  # quick\npython x.py \\\n    --a 'b c' && pip install .[train]\n\n# nothing\n$ make docs > log"
    )
    expected = [["make", "test"], ["python", "x.py", "--a", "b c"], ["pip", "install", ".[train]"], ["make", "docs"]]
    assert [*commands(text)][:4] == expected


def test_extras_that_pages_know_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert set(EXTRAS.values()) <= setup["options.extras_require"].keys()
