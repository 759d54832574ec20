"""`python -m lion_hf SCRIPT ARGS` works like `python SCRIPT ARGS`, with LION registered in the Auto classes."""

import json
import os
import subprocess
import sys

import pytest

from lion_hf.__main__ import main


KNOWS_LION = """
import json, multiprocessing, sys
import helper
from transformers import AutoConfig


class Own:
    pass


def known(own):
    try:
        lion = type(AutoConfig.for_model("lion")).__name__
    except ValueError:
        lion = None
    return [type(own).__name__, lion, "own_variants" in sys.modules, __name__, sys.argv]


def given_back(own):
    return own


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.apply(known, (Own(),))
        assert isinstance(pool.map_async(given_back, [Own()]).get(60)[0], Own)
    here = [sys.argv, sys.path[0], __name__, __file__, Own.__module__, helper.__file__]
    print(json.dumps({"here": here, "known": known(Own()), "spawned": spawned}))
"""

FAILS = """
import sys
def fail():
    if "quietly" in sys.argv:
        sys.exit(7)
    raise KeyError(f"{sys.argv[1:]}")
fail()
"""


def run(folder, *command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment)


@pytest.fixture
def scripts(tmp_path):
    """Return the current folder of a user; scripts are in a subfolder."""
    (tmp_path / "below").mkdir()
    (tmp_path / "own_variants.py").write_text("")
    (tmp_path / "below" / "helper.py").write_text("")
    for name, text in {"knows_lion.py": KNOWS_LION, "fails.py": FAILS, "wrong.py": "x = 1\ny = (\n"}.items():
        (tmp_path / "below" / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_script_runs_as_alone_and_it_and_its_processes_know_lion(scripts):
    arguments = ["below/knows_lion.py", "--help", "x", "--", "--import", "y"]
    alone = run(scripts, *arguments)
    with_lion = run(scripts, "-m", "lion_hf", "--import", "own_variants", *arguments)
    assert alone.returncode == with_lion.returncode == 0, alone.stderr + with_lion.stderr
    alone, with_lion = (json.loads(done.stdout.splitlines()[-1]) for done in (alone, with_lion))
    assert with_lion["here"] == alone["here"]
    for where, name in (("known", "__main__"), ("spawned", "__mp_main__")):
        assert alone[where] == ["Own", None, False, name, arguments]
        assert with_lion[where] == ["Own", "LionConfig", True, name, arguments]


@pytest.mark.parametrize(
    "arguments",
    [["fails.py"], ["fails.py", "quietly"], ["wrong.py"]],
    ids=str,
)
@pytest.mark.slow
def test_exit_codes_and_tracebacks_are_those_of_the_script_alone(scripts, arguments):
    alone = run(scripts / "below", *arguments)
    with_lion = run(scripts / "below", "-m", "lion_hf", *arguments)
    assert with_lion.returncode == alone.returncode != 0
    length = len(alone.stderr)  # the output of other libraries' imports comes first
    assert with_lion.stderr[len(with_lion.stderr) - length :] == alone.stderr and "lion_hf" not in with_lion.stderr


WRONG = {
    "script": (["nowhere.py"], "lion_hf: error: there is no script 'nowhere.py'.\n"),
    "folder": (["below"], "lion_hf: error: there is no script 'below'.\n"),
    "module": (
        ["--import", "nowhere_at.all", "below/fails.py"],
        "lion_hf: error: --import nowhere_at.all: there is no module 'nowhere_at' in the current folder or "
        "installed.\n",
    ),
    "file": (
        ["--import", "below/fails.py", "below/fails.py"],
        "lion_hf: error: --import below/fails.py: give the name of the module, below.fails, not its file.\n",
    ),
    "file elsewhere": (
        ["--import", "/else/own.py", "below/fails.py"],
        "lion_hf: error: --import /else/own.py: give the name of the module, own, not its file; its folder '/else' "
        "must be in PYTHONPATH.\n",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_mistakes_are_one_line(scripts, monkeypatch, capsys, kind):
    monkeypatch.chdir(scripts)
    arguments, message = WRONG[kind]
    assert main(arguments) == 2
    assert capsys.readouterr().err == message


def test_an_error_inside_an_imported_module_is_not_hidden(scripts, monkeypatch):
    (scripts / "needs_more.py").write_text("import something_else")
    monkeypatch.syspath_prepend(scripts)
    with pytest.raises(ModuleNotFoundError, match="something_else"):
        main(["--import", "needs_more", str(scripts / "below" / "fails.py")])


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), ([], 2), (["--imp", "os", "x.py"], 2)], ids=str)
def test_the_command_line_explains_itself(arguments, code, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code
    told = capsys.readouterr()
    assert "python -m lion_hf [-h] [--import MODULE] SCRIPT" in told.out + told.err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_launchers_run_it(scripts, launcher):
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
        command = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    else:
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m"]
    done = run(scripts, "-m", *command, "lion_hf", "--import", "own_variants", "below/knows_lion.py", "--x")
    assert done.returncode == 0, done.stderr
    (found,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"here"')]
    for where, name in (("known", "__main__"), ("spawned", "__mp_main__")):
        assert found[where] == ["Own", "LionConfig", True, name, ["below/knows_lion.py", "--x"]]
