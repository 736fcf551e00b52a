"""Run ``docs/notebook.ipynb`` and show in it what its cells give: ``python -m tests.notebook``.

Pictures are kept as JPEG: as PNG they would make the file a large one.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
Output = dict[str, Any]


def read() -> dict[str, Any]:
    """Return the notebook."""
    found: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return found


def run(cells: list[dict[str, Any]]) -> list[list[Output]]:
    """Run the cells of code beside the notebook, in one namespace, and return what each shows."""
    names: dict[str, Any] = {}
    here = Path.cwd()
    os.chdir(NOTEBOOK.parent)
    try:
        return [_run("".join(cell["source"]), names) for cell in cells]
    finally:
        os.chdir(here)


def _run(source: str, names: dict[str, Any]) -> list[Output]:
    """Run one cell: what it prints, and what its last line is."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    outputs: list[Output] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(text)})
    if value is not None:
        data = _data(value)
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    return outputs


def _data(value: Any) -> dict[str, Any]:
    """Return what Jupyter would show of a value: its picture, or its text."""
    draw = getattr(value, "_repr_png_", None)
    if draw is None:
        return {"text/plain": _lines(repr(value))}
    content = io.BytesIO()
    Image.open(io.BytesIO(draw())).convert("RGB").save(content, "JPEG", quality=88)
    return {"image/jpeg": base64.b64encode(content.getvalue()).decode()}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Write what the cells show into the notebook."""
    notebook = read()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, run(cells), strict=True), 1):
        cell |= {"outputs": outputs, "execution_count": number}
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
