"""Run scripts in new processes that start without delay, because they are forked from a server.

A new interpreter needs several seconds to import PyTorch, Transformers and datasets. The server has already imported
them, and does nothing else, so a fork of it behaves like a new process.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


_CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server():
    """Start the server with this process's sys.path, which it does not inherit before Python 3.12.4."""
    _CONTEXT.set_forkserver_preload(["forks_preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        multiprocessing.forkserver.ensure_running()


class Script:
    """A running script: its process, and a log of its stdout and stderr."""

    def __init__(self, command, log: Path, environment=None):
        _start_server()
        self.log = log
        self.process = _CONTEXT.Process(target=_run, args=(command, str(log), environment or {}))
        self.process.start()

    def wait(self) -> str:
        """Wait for the script and return its output. Fail with the end of the output if the script failed."""
        self.process.join()
        text = self.log.read_text()
        assert self.process.exitcode == 0, f"exit code {self.process.exitcode}\n{text[-3000:]}"
        return text


def run_script(command: list[str], log: Path, processes: int = 1) -> str:
    """Run `[script, *flags]` in one process, or in several with the environment variables that torchrun sets."""
    if processes == 1:
        return Script(command, log).wait()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    scripts = [Script(command, log.with_suffix(f".{i}.txt"), extra) for i, extra in enumerate(environments)]
    return "".join([script.wait() for script in scripts])


def _run(command, log, environment):
    """Run the script in the new process."""
    os.environ.update(environment)
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    torch.set_num_threads(1)
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
