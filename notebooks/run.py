"""Executes chapters and keeps their outputs, without what differs from run to run: `python notebooks/run.py [FILE...]`.

With `--check` nothing is written. A chapter fails on its first error, on a word on stderr (a warning, a log line) and
on an output that a code host would not show.
"""

import json
import pathlib
import sys

import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent
MOST_BYTES = 200_000
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def main(arguments: list[str]) -> None:
    files = [pathlib.Path(name) for name in arguments if name != "--check"] or sorted(HERE.glob("*.ipynb"))
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        where = {"metadata": {"path": str(HERE)}}
        nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=where).execute()
        notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
        for cell in notebook.cells:
            cell.metadata = nbformat.from_dict({})
            join_streams(cell)
            check(file, cell)
        if "--check" not in arguments:
            nbformat.write(notebook, file)
        print(f"{file.name}: {len(json.dumps(notebook)):,} bytes")


def join_streams(cell: nbformat.NotebookNode) -> None:
    """Text written by one cell as one output: how it was cut up is a matter of time."""
    joined: list[nbformat.NotebookNode] = []
    for output in cell.get("outputs", []):
        if joined and output.get("name") and output.get("name") == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    # A line that counts seconds and is wiped at the end leaves nothing to read.
    joined = [output for output in joined if output.get("name") != "stderr" or left_over(output.text)]
    if "outputs" in cell:
        cell.outputs = joined


def left_over(text: str) -> str:
    """What a terminal shows in the end of text that rewrites its line."""
    return "\n".join(line.rpartition("\r")[2].removeprefix("\033[K") for line in text.split("\n")).strip()


def check(file: pathlib.Path, cell: nbformat.NotebookNode) -> None:
    for output in cell.get("outputs", []):
        if output.get("name") == "stderr":
            raise SystemExit(f"{file.name}: a cell wrote to stderr:\n{output['text']}\nIt is:\n{cell.source}")
        size = len(json.dumps(output))
        if size > MOST_BYTES:
            raise SystemExit(f"{file.name}: an output has {size:,} bytes, more than {MOST_BYTES:,}, of\n{cell.source}")


if __name__ == "__main__":
    main(sys.argv[1:])
