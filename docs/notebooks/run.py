"""Run the notebooks beside this file anew, each in a fresh kernel, and write what they show into them.

    python docs/notebooks/run.py [NAME.ipynb ...]

What would differ from run to run without meaning anything is left out: progress bars, times, numbers of cells
and of versions.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS = 1200  # that a cell may take
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a run in a fresh kernel, which imports this checkout.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails; the message has the cell and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.record_timing = False
    client.execute(env=env)
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from run to run."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_progress(output)]
            cell.execution_count = None
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # PIL's images give both kinds
                if output.output_type == "execute_result":
                    output.execution_count = None
    return notebook


def is_progress(output: NotebookNode) -> bool:
    """Whether an output is a progress bar: in place of one, or text on stderr."""
    return output.get("name") == "stderr" or "<progress" in output.get("data", {}).get("text/html", "")


def main(names: list[str]) -> None:
    """Run the named notebooks, by default all."""
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        nbformat.write(executed(path), path)
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
