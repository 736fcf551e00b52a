"""Write vitviz/__init__.pyi, by which editors and type checkers know the lazy package.

Run it with ``python -m tests.stub``; a test holds the file to what the functions really take.
"""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path
from typing import Any

import vitviz
from vitviz.methods.table import METHODS

STUB = Path(vitviz.__file__).with_suffix(".pyi")
FUNCTIONS = {name.replace("-", "_"): method for name, method in METHODS.items()}
HEAD = '''\
"""Signatures of the lazy package, for editors and type checkers; see ``tests/stub.py``."""

from vitviz.api import evaluate as evaluate
from vitviz.api import explain_samples as explain_samples
from vitviz.api import grid as grid
from vitviz.api import load_model as load_model
from vitviz.api import load_samples as load_samples
from vitviz.comparing_api import compare as compare
from vitviz.errors import VitvizError as VitvizError
from vitviz.evaluation.summary import Evaluation as Evaluation
from vitviz.explaining.explanation import Explanation as Explanation
from vitviz.explaining.explanation import Prediction as Prediction
from vitviz.features_api import features as features
from vitviz.features_api import similarity as similarity
from vitviz.models.model import Model as Model
from vitviz.options import AttentionRule as AttentionRule
from vitviz.options import Convention as Convention
from vitviz.options import Fit as Fit
from vitviz.options import Foreground as Foreground
from vitviz.options import HeadFusion as HeadFusion
from vitviz.options import PictureOptions as PictureOptions
from vitviz.options import ResidualRule as ResidualRule
from vitviz.python_values import Classes as Classes
from vitviz.python_values import Images as Images
from vitviz.python_values import Target as Target
from vitviz.python_values import Values as Values
from vitviz.python_values import Versus as Versus

__version__: str
'''


def stub() -> str:
    """Return the text of the stub."""
    return HEAD + "".join(_function(name) for name in FUNCTIONS)


def _function(name: str) -> str:
    function = getattr(vitviz, name)
    parameters, star = [], False
    for each in inspect.signature(function).parameters.values():
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        parameters.append(_parameter(each))
    lines = "".join(f"    {each},\n" for each in parameters)
    summary = (function.__doc__ or "").splitlines()[0]
    return f'\ndef {name}(\n{lines}) -> list[Explanation]:\n    """{summary}"""\n'


def _parameter(parameter: inspect.Parameter) -> str:
    text = f"{parameter.name}: {parameter.annotation}"
    if parameter.default is inspect.Parameter.empty:
        return text
    return f"{text} = {_default(parameter.default)}"


def _default(value: Any) -> str:
    return (
        f"{type(value).__name__}.{value.name}"
        if isinstance(value, Enum)
        else repr(value).replace("'", '"')
    )


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
