"""The newcomer's trial: its page can be read, its runner notices broken promises, and (slow) all its steps pass."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "docs" / "contributing" / "newcomer.py"
spec = importlib.util.spec_from_file_location("newcomer", RUNNER)
newcomer = importlib.util.module_from_spec(spec)
sys.modules["newcomer"] = newcomer
spec.loader.exec_module(newcomer)
README = "```python\nprint(1)\n```\n```bash\npip install lion-hf\npython -c 'print(2)'\n```\n"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def steps():
    return newcomer.parse(RUNNER.with_suffix(".md").read_text(encoding="utf-8"), README)


@pytest.fixture
def small_copy(monkeypatch, tmp_path):
    """A checkout with nothing in it, so that copying it takes no time."""
    (tmp_path / "root").mkdir()
    monkeypatch.setattr(newcomer, "ROOT", tmp_path / "root")
    return tmp_path


def run_page(page, folder):
    steps = newcomer.parse(page, README)
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return newcomer.trial(steps, Path(sys.executable), scratch)


def block(comment, code):
    return f"## A step\n\n<!-- {comment} -->\n```bash\n{code}\n```\n"


def test_every_step_of_the_page_says_what_must_be_seen(steps):
    own = [step for step in steps if not step.name.startswith("README")]
    assert len(own) > 25 and all(step.says or step.bare for step in own)
    assert [step.name for step in own if step.bare] == ["Install (1)"]
    assert {step.exit for step in own} == {0, 2, 130}
    assert [step.name for step in own if step.interrupt] == ["Ctrl-C (1)"]


def test_blocks_are_code_that_bash_and_python_take(steps):
    for step in steps:
        subprocess.run(["bash", "-n", "-c", step.code], check=True)
        for here in step.code.split("<<'END'\n")[1:]:
            compile(here.split("\nEND\n")[0], step.name, "exec")


def test_blocks_of_the_readme_stand_in_their_place(steps):
    names = [step.name for step in steps]
    places = [names.index(name) for name in ("README: python -c 'print(2)'", "README, Python", "Your own text (1)")]
    assert places == sorted(places)
    assert "\nprint(1)\n" in steps[places[1]].code


def test_the_readme_of_the_project_has_steps():
    steps = newcomer.parse("<!-- README -->\n", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(steps) > 1


def test_trainings_of_the_readme_are_short_and_installations_left_out():
    text = (
        "git clone https://example.org/x\ncd x\npip install -e '.[train]'  # from source\nmake demo\n"
        "python examples/run_mlm.py --output_dir a \\\n    --train_file own.txt  # five minutes\n"
        "python examples/run_mlm.py examples/recipes/mlm/lion.yaml --preset lion-s-base\nlion-convert 'a b' c\n"
    )
    commands = list(newcomer.commands_of(text))
    expected = [
        "python examples/run_mlm.py --output_dir a --train_file own.txt",
        "python examples/run_mlm.py examples/recipes/mlm/lion.yaml --preset lion-s-base --smoke",
        "lion-convert 'a b' c",
    ]
    assert [newcomer.affordable(command, False) for command in commands] == expected
    expected[0] += " --max_steps 8"
    assert [newcomer.affordable(command, True) for command in commands] == expected


@pytest.mark.parametrize(
    "comment, code",
    [
        ("exit 0", "true"),
        ('exit 2; says "did you mean", "--x; y"', "echo 'did you mean --x; y' >&2; exit 2"),
        ('exit 130; says "stopped"; interrupt "made*"', "trap 'echo stopped; exit 130' INT; touch made; sleep 20"),
        ("exit 1; bare", "false"),
        ("exit 0", 'test "$HF_HUB_OFFLINE" = 1 && test -d "$PWD" && test ! -e .git'),
    ],
)
def test_a_promise_that_holds_passes(comment, code, small_copy, capsys):
    assert run_page(block('exit 0; says "there"', "echo there") + block(comment, code), small_copy)
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "comment, code, problem",
    [
        ("exit 0", "exit 3", "exit code 3, expected 0"),
        ("exit 0", "false\ntrue", "exit code 1, expected 0"),
        ("exit 2", "true", "exit code 0, expected 2"),
        ('exit 0; says "there", "not there"', "echo there", "does not show 'not there'"),
        ("exit 1", "python -c 'raise KeyError'", "shows a traceback"),
        ('exit 0; interrupt "never"', "true", "ended before never was there"),
    ],
)
def test_a_promise_that_does_not_hold_fails(comment, code, problem, small_copy, capsys):
    assert not run_page(block(comment, code), small_copy)
    out = capsys.readouterr().out
    assert out.count(f"FAILED: {problem}") == 2 and "0 of 1 steps passed" in out


def test_a_step_that_hangs_is_stopped_with_its_processes(small_copy, monkeypatch, capsys):
    monkeypatch.setattr(newcomer, "LIMIT", 0.5)
    assert not run_page(block("exit 0", "sleep 30 & sleep 30"), small_copy)
    assert "took more than 0.5 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "page",
    [
        "no steps",
        "## A\n```bash\ntrue\n```\n",
        block("exit zero", "true"),
        block("says nothing", "true"),
        block('exit 0; shows "x"', "true"),
        block('exit 0; says "never shown"; says "true"', "echo true"),
        block("exit 0", "true") + block("exit 0", "true").replace("bash", "sh"),
        block("exit 0", "true") + "- in a list:\n  ```bash\n  false\n  ```\n",
    ],
)
def test_a_page_that_breaks_its_rules_is_refused(page):
    with pytest.raises(newcomer.PageError):
        newcomer.parse(page, README)


@pytest.mark.parametrize("command", ["true && false", "false | true", "cd docs; false", "echo > outputs/x"])
def test_a_command_of_the_readme_with_shell_operators_is_refused(command):
    assert [*newcomer.commands_of("echo 'a' b  # c; d\n")] == ["echo a b"]
    with pytest.raises(newcomer.PageError, match="one plain command"):
        [*newcomer.commands_of(f"{command}\n")]


def test_processes_that_a_step_leaves_are_ended(small_copy):
    mark = small_copy / "mark"
    assert run_page(block("exit 0", f"sleep 60 & echo $! > {mark}"), small_copy)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(mark.read_text()), 0)
            time.sleep(0.05)


@pytest.mark.parametrize("readme", ["# Nothing\n", "```bash\necho\n```\n", "```python\n1\n```\n```bash\nmake x\n```\n"])
def test_a_readme_without_blocks_is_refused(readme):
    with pytest.raises(newcomer.PageError, match="README"):
        newcomer.parse("<!-- README -->\n", readme)


def test_the_exit_code_tells_what_happened(tmp_path):
    page = tmp_path / "page.md"
    codes = []
    for text in (block("exit 0", "true"), block("exit 0", "false"), "no steps"):
        page.write_text(text)
        command = [sys.executable, RUNNER, "--python", sys.executable, "--page", page]
        codes.append(subprocess.run(command, capture_output=True).returncode)
    codes.append(subprocess.run([*command[:-1], tmp_path / "absent.md"], capture_output=True).returncode)
    assert codes == [0, 1, 2, 2]


def test_a_runner_that_is_ended_ends_its_step(tmp_path):
    page, mark = tmp_path / "page.md", tmp_path / "mark"
    page.write_text(block("exit 0", f"echo $$ > {mark}.part; mv {mark}.part {mark}; sleep 60; true"))
    command = [sys.executable, RUNNER, "--python", sys.executable, "--page", page]
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)})
    end = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.05)
    runner.terminate()
    assert runner.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert not list(tmp_path.glob("newcomer-*"))


def test_ctrl_c_reaches_a_step_of_a_runner_in_the_background(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(block('exit 130; says "stopped"; interrupt "m"', "trap 'echo stopped; exit 130' INT; >m; sleep 20"))
    command = [sys.executable, RUNNER, "--python", sys.executable, "--page", page]
    script = shlex.join(map(str, command))
    run = subprocess.run(["bash", "-c", f"{script} & wait $!"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_the_trial_passes_in_this_environment():
    if not Path(sys.executable).with_name("lion-convert").exists():
        pytest.skip("needs an environment in which lion_hf is installed")
    command = [sys.executable, RUNNER, "--short", "--python", sys.executable]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
