"""Markdown pages as the tests read them: blocks of code and what they print, links, headings, commands."""

import ast
import contextlib
import doctest
import importlib.util
import io
import logging
import re
import shlex
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging as transformers_logging


ROOT = Path(__file__).parents[2]
CHECKER, OPTIONS = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# What a block imports or calls, and the extra of setup.cfg that installs it.
EXTRAS = {
    "peft": "peft",
    "torchao": "quantization",
    "sentence_transformers": "sentence",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
}
# Blocks with these take more than a few seconds to import or to run.
SLOW = ("sentence_transformers", "onnx.export", "onnxruntime", "torch.compile(")


@dataclass
class Block:
    language: str
    code: str
    line: int  # of its first line in the page
    before: str  # the page above it
    output: str | None = None  # the `text` block right below it

    @property
    def is_slow(self) -> bool:
        return any(word in self.code for word in SLOW)

    @property
    def extras(self) -> dict[str, str]:
        imported = {name: extra for name, extra in EXTRAS.items() if re.search(rf"(from|import) {name}\b", self.code)}
        return imported | ({"onnxscript": "onnx"} if "onnx.export" in self.code else {})

    @property
    def missing(self) -> list[str]:
        return [name for name in self.extras if importlib.util.find_spec(name) is None]


def split(text: str) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and its prose with an empty line for each line of a block."""
    blocks, prose, fence, last_end = [], [], None, -1
    lines = text.splitlines()
    for number, line in enumerate(lines):
        mark = re.match(r"( *)(```+|~~~+) *([\w-]*)", line)
        if fence is None and mark:
            fence, start = mark, number + 1
        elif fence is not None and re.fullmatch(rf" *{fence[2]}`* *", line):
            code = "\n".join(inner.removeprefix(fence[1]) for inner in lines[start:number]) + "\n"
            right_below = blocks and not any(part.strip() for part in lines[last_end + 1 : start - 1])
            if fence[3] == "text" and right_below and blocks[-1].output is None:
                blocks[-1].output = code
            blocks.append(Block(fence[3], code, start + 1, "\n".join(lines[: start - 1])))
            fence, last_end = None, number
        elif fence is None:
            prose.append(line)
            continue
        prose.append("")
    assert fence is None, f"the block that opens at line {start} does not close"
    return blocks, "\n".join(prose)


def blocks_of(page: Path, *languages: str) -> list[Block]:
    return [block for block in split(page.read_text(encoding="utf-8"))[0] if block.language in languages]


# ------------------------------------------------------------------------------------------------ what a block prints


def comments_behind_prints(code: str) -> str:
    """The comments behind `print(...)`, one in a line, in the order of the code."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print":
            comment = comments.get(node.end_lineno)
            if comment and comment.start[1] > node.end_col_offset:
                found.append((node.lineno, comment.string.lstrip("# ")))
    return "".join(f"{comment}\n" for _, comment in sorted(found))


@contextlib.contextmanager
def what_a_reader_sees() -> Iterator[io.StringIO]:
    """Stdout, and the warnings that Transformers, this package and other libraries log."""
    transformers_logging.warning_once.cache_clear()  # or a page would not show what another one has caused
    shown, level = io.StringIO(), transformers_logging.get_verbosity()
    handler = logging.StreamHandler(shown)
    handler.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("", "transformers")]
    transformers_logging.set_verbosity_warning()
    try:
        for logger in loggers:
            logger.addHandler(handler)
        with contextlib.redirect_stdout(shown):
            yield shown
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        transformers_logging.set_verbosity(level)


def run(block: Block, namespace: dict, name: str) -> None:
    """Runs a block; fails where the page does not show what it prints, or shows something else."""
    place = f"{name}, line {block.line}"
    with what_a_reader_sees() as shown:
        exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
    got = shown.getvalue()
    expected = comments_behind_prints(block.code) if block.output is None else block.output
    assert expected or not got.strip(), f"{place}: the page does not show what the block prints:\n{got}"
    check_output(expected, got, place)


def check_output(expected: str, got: str, place: str) -> None:
    """Compares as doctest does, with `...` for anything."""
    assert not expected or re.search(r"\w", expected.replace("...", "")), f"{place}: the shown output has no text"
    bold_and_source = r"\x1b\[[\d;]*m|^\[transformers\] "  # of what Transformers logs
    got, expected = (re.sub(bold_and_source, "", text, flags=re.MULTILINE) for text in (got, expected))
    wanted = re.sub(r"\s*^ *\.\.\. *$\s*", "...", expected, flags=re.MULTILINE)  # such a line may stand for none
    if not CHECKER.check_output(wanted, got, OPTIONS):
        raise AssertionError(f"{place}\n" + CHECKER.output_difference(doctest.Example("", expected), got, OPTIONS))


# ------------------------------------------------------------------------------------------------------------ links


def anchors_of(page: Path) -> set[str]:
    """What a code host makes of the headings: lower case, no punctuation, hyphens for spaces, numbers for repeats."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)?$", split(page.read_text(encoding="utf-8"))[1], re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)


def links_of(page: Path) -> list[str]:
    """The targets of links and pictures in the prose of a page."""
    prose = re.sub(r"(`+)(?:(?!\n\n).)+?\1", "`code`", split(page.read_text(encoding="utf-8"))[1], flags=re.DOTALL)
    patterns = r"\]\(\s*<?([^)\s>]+)[^)]*\)", r"^\[[^\]]+\]: +(\S+)", r"\b(?:src|href)=\"([^\"]+)\""
    return [target for pattern in patterns for target in re.findall(pattern, prose, re.MULTILINE)]


def dead_links(page: Path) -> list[str]:
    dead = []
    for target in links_of(page):
        if re.match(r"(https?|mailto):", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        inside = file.exists() and ROOT in (file.resolve(), *file.resolve().parents)
        if not inside or (anchor and anchor not in (anchors_of(file) if file.suffix == ".md" else ())):
            dead.append(target)
    return dead


# --------------------------------------------------------------------------------------------------------- commands


def commands(text: str) -> Iterator[list[str]]:
    """The commands in a shell block, as words: one for each line, without comments and variables set before them."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[();<>|&]+", word):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"\w+=|[$%]$", word):
                words.append(word)


def commands_of(page: Path) -> list[list[str]]:
    """The commands in shell blocks, and in prose those that begin with `python`, `make` or `lion-convert`."""
    blocks, prose = split(page.read_text(encoding="utf-8"))
    inline = re.findall(r"(?<!`)`((?:python|make|lion-convert) [^`]+)`(?!`)", prose)
    shell = [block.code for block in blocks if block.language in ("bash", "sh", "console", "")]
    return [words for text in [*shell, *(text.replace("\n", " ") for text in inline)] for words in commands(text)]
