"""Run the notebooks of this folder and store what they print and draw.

    python examples/notebooks/execute.py                # both notebooks: about 2 minutes on one CPU core
    python examples/notebooks/execute.py text.ipynb

The notebooks write below examples/notebooks/outputs. Needs `pip install 'lion-hf[train]' nbclient ipykernel`.
"""

import argparse
import sys
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient


FOLDER = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class ThisPython(AsyncKernelManager):
    """Starts kernels with the running interpreter, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm warns without ipywidgets; no bar is shown
        return KernelSpec(argv=command, env=quiet, display_name=KERNEL["display_name"], language=KERNEL["language"])


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: int = 1200) -> nbformat.NotebookNode:
    """Run all cells and return the notebook with their outputs, without time stamps and data about the machine.

    Args:
        notebook: the notebook, whose old outputs are replaced.
        folder: the working directory of the kernel.
        timeout: seconds that one cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises an error.
    """
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
    ).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", default=["text.ipynb", "images.ipynb"], help="names (default: both)")
    for name in parser.parse_args().notebooks:
        notebook = execute(nbformat.read(FOLDER / name, as_version=4), FOLDER)
        nbformat.write(notebook, FOLDER / name)
        print(f"wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
