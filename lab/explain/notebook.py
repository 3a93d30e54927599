"""Runs the walk-through from a clean kernel and stores its output in it.

python -m lab.explain.notebook        rewrites lab/explain/walkthrough.ipynb; needs nbclient and ipykernel
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from command import machine, pictures

PATH = Path(__file__).parent / "walkthrough.ipynb"


def executed(path: Path = PATH) -> nbformat.NotebookNode:
    """The notebook with the output of a run in a kernel of its own. Raises nbclient's CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    client = NotebookClient(notebook, timeout=300, record_timing=False, resources={"metadata": {"path": path.parent}})
    client.execute()
    notebook.metadata = metadata  # without the versions of this machine's kernel
    return notebook


def rewrite() -> None:
    text = nbformat.writes(executed()) + "\n"
    pictures.replace(PATH, "notebook", lambda file: file.write(text.encode()))
    print(PATH)


if __name__ == "__main__":
    sys.exit(machine.run("lab.explain.notebook", rewrite))
