"""Run the newcomer's trial: the commands of newcomer.md, in order, in a scratch copy of the checkout.

    python docs/contributing/newcomer.py                            # in a bare environment, as at each release
    python docs/contributing/newcomer.py --python .venv/bin/python  # in an existing environment
    python docs/contributing/newcomer.py --keep                     # keep the scratch folder and print its path

Needs Python 3.10 or newer and nothing else. Exit code 0 if every step showed what the page promises, 1 if one did not,
2 if the page cannot be read. The rules of the page's comments are in its section "How a step is written".
"""

import argparse
import contextlib
import glob
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_name("newcomer.md")
# Left out of the scratch copy: what git ignores, and the repository itself.
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "outputs", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
)
LIMIT = 900  # seconds after which a step is stopped
SHOWN = 6000  # characters of the output of a failed step that are printed, the last ones
# Commands of the README that the trial does not run: it has its own copy and environment, and `make` builds another.
NOT_RUN = ("git", "cd", "pip", "python -m pip", "python -m venv", "python3 -m venv", "source", "make")
SHELL = re.compile(r"^\s*(?:```+|~~~+) *(?:bash|sh|shell|console)\b", re.M)
BLOCK = re.compile(r"(?:^<!-- (?P<comment>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


class PageError(Exception):
    """The page does not follow its own rules."""


@dataclass
class Step:
    """A command, and what must be seen when it runs."""

    name: str
    code: str
    exit: int = 0
    says: list[str] = field(default_factory=list)
    interrupt: str = ""  # a pattern; Ctrl-C is sent as soon as a file matches it
    bare: bool = False  # only in a bare environment


# ------------------------------------------------------------------------------------------------------- the page


def parse(page: str, readme: str, short: bool = False) -> list[Step]:
    """Return the steps of the page, with the blocks of the README in the place of its README comment."""
    steps, heading, place = [], "", 0
    pattern = re.compile(rf"^#+ (?P<heading>[^\n]*)$|^<!-- (?P<readme>README) -->$|{BLOCK.pattern}", re.M | re.S)
    for match in pattern.finditer(page):
        if match["heading"]:
            heading, place = match["heading"], 0
        elif match["readme"]:
            steps += readme_steps(readme, short)
        elif match["language"] == "bash":
            place += 1
            steps.append(step_of(f"{heading} ({place})", match["comment"], match["code"]))
    if not steps:
        raise PageError("the page has no steps")
    own = len([match for match in pattern.finditer(page) if match["language"] == "bash"])
    if missed := len(SHELL.findall(page)) - own:
        raise PageError(f"{missed} shell blocks are no steps; a step begins with ```bash at the start of a line")
    return steps


def step_of(name: str, comment: str | None, code: str) -> Step:
    if comment is None:
        raise PageError(f"{name}: no comment above the block states what must be seen")
    step, words = Step(name, code), set()
    for clause in re.split(r"; (?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", comment):
        word, _, rest = clause.partition(" ")
        if word in words:
            raise PageError(f"{name}: the comment has {word!r} twice")
        words.add(word)
        if word == "exit" and rest.isdecimal():
            step.exit = int(rest)
        elif word == "says" and re.fullmatch(r'"[^"]+"(, "[^"]+")*', rest):
            step.says = re.findall(r'"([^"]+)"', rest)
        elif word == "interrupt" and re.fullmatch(r'"[^"]+"', rest):
            step.interrupt = rest.strip('"')
        elif clause == "bare":
            step.bare = True
        else:
            raise PageError(f"{name}: {clause!r} is not a clause; allowed are exit, says, interrupt and bare")
    return step


def readme_steps(readme: str, short: bool) -> list[Step]:
    """Return one step for each command of the README, then one for all its Python blocks, which share their names."""
    blocks = {"bash": [], "python": []}
    for match in BLOCK.finditer(readme):
        blocks.setdefault(match["language"], []).append(match["code"])
    commands = [command for block in blocks["bash"] for command in commands_of(block)]
    if not commands or not blocks["python"]:
        raise PageError("README.md has no command that the trial can run, or no Python")
    steps = [Step(f"README: {shorten(command)}", affordable(command, short)) for command in commands]
    code = "\n".join(blocks["python"])
    return [*steps, Step("README, Python", f"python - <<'README'\n{code}README\n")]


def commands_of(block: str) -> Iterator[str]:
    """Commands that the trial runs, with continued lines joined."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        if any(re.fullmatch(r"[();<>|&]+", word) for word in words):
            raise PageError(f"README.md: {line.strip()!r} is not one plain command, which the trial needs")
        command = re.sub(r" +", " ", shlex.join(words))
        if words and not any(f"{command} ".startswith(f"{start} ") for start in NOT_RUN):
            yield command


def affordable(command: str, short: bool) -> str:
    """The command; a recipe, which is made for GPUs, with --smoke; with `short`, other trainings with a few steps."""
    if "examples/recipes/" in command:
        return f"{command} --smoke"
    return f"{command} --max_steps 8" if short and "examples/run_" in command else command


def shorten(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


# -------------------------------------------------------------------------------------------------------- running


def environment(folder: Path, python: Path, bare: bool) -> dict[str, str]:
    """Variables for the steps: `python` first on PATH, no network, nothing left by other projects."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HF_HOME", "HF_MODULES_CACHE")
    variables = {name: value for name, value in os.environ.items() if name not in dropped}
    variables |= {
        "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]]),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "COLUMNS": "120",
    }
    # An existing environment may hold another copy of the package.
    return variables if bare else variables | {"PYTHONPATH": str(folder / "checkout" / "src")}


def run(step: Step, checkout: Path, variables: dict[str, str]) -> tuple[str, list[str]]:
    """Run a step; return its output and what is wrong with it."""
    log = checkout.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", step.code], cwd=checkout, env=variables, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            stopped = wait(process, step, checkout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what a finished step has left in the background
            process.wait()
    output = log.read_text(encoding="utf-8", errors="replace")
    return output, [*stopped, *(wrong(step, process.returncode, output))]


def wait(process: subprocess.Popen, step: Step, checkout: Path) -> list[str]:
    """Wait for the end of a step, and interrupt it where the page asks for that."""
    end, sent = time.monotonic() + LIMIT, False
    while process.poll() is None:
        if time.monotonic() > end:
            return [f"took more than {LIMIT} s"]
        if step.interrupt and not sent and glob.glob(str(checkout / step.interrupt)):
            os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
            sent = True
        time.sleep(0.05)
    return [] if sent or not step.interrupt else [f"ended before {step.interrupt} was there"]


def wrong(step: Step, code: int, output: str) -> list[str]:
    """What the page promises and the step did not show."""
    found = [] if code == step.exit else [f"exit code {code}, expected {step.exit}"]
    found += [f"does not show {text!r}" for text in step.says if text not in output]
    if "Traceback (most recent call last)" in output:
        found.append("shows a traceback")
    return found


def trial(steps: list[Step], python: Path | None, folder: Path) -> bool:
    """Run all steps; print a line for each, the output of failed ones, and a summary. Return whether all passed."""
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=IGNORED)
    if python is None:
        subprocess.run([sys.executable, "-m", "venv", folder / "bare"], check=True)
    variables = environment(folder, python or folder / "bare" / "bin" / "python", python is None)
    chosen = [step for step in steps if python is None or not step.bare]
    width = max(len(step.name) for step in chosen)
    begin, failed = time.monotonic(), []
    for step in chosen:
        started = time.monotonic()
        output, problems = run(step, checkout, variables)
        result = "FAILED: " + "; ".join(problems) if problems else "passed"
        line = f"{step.name:{width}}  {time.monotonic() - started:6.1f} s  {result}"
        print(line, flush=True)
        if problems:
            failed.append(line)
            print(f"{step.code}--- output\n{output.strip()[-SHOWN:]}\n---", flush=True)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} steps passed, {time.monotonic() - begin:.0f} s")
    print("\n".join(failed), end="\n" if failed else "")
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, help="Python of an existing environment; by default a bare one is made.")
    parser.add_argument("--keep", action="store_true", help="Keep the scratch folder.")
    parser.add_argument("--short", action="store_true", help="Stop the training runs of the README after 8 steps.")
    parser.add_argument("--page", type=Path, default=PAGE, help="Page with the steps.")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="README whose blocks are run.")
    options = parser.parse_args()
    # Not resolved: the python of a virtual environment is a link, and its folder is what matters.
    python = options.python and Path(os.path.abspath(options.python))
    if python and not python.exists():
        parser.error(f"--python {options.python} does not exist")
    try:
        page, readme = (path.read_text(encoding="utf-8") for path in (options.page, options.readme))
        steps = parse(page, readme, options.short)
    except (PageError, OSError, UnicodeDecodeError) as error:
        print(f"{options.page}: {error}", file=sys.stderr)
        return 2
    # A process in the background may have been started with Ctrl-C ignored, which its children would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs the `finally` parts, which end the step
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))
    try:
        return 0 if trial(steps, python, folder) else 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        if options.keep:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
