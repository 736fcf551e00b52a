"""What Python users call to set several methods side by side."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

from vitviz.api import explain
from vitviz.explaining.comparing import Sheet, compared
from vitviz.methods.comparison import DEFAULT_COLUMNS, Comparison
from vitviz.models.model import Model
from vitviz.options import Fit, PictureOptions
from vitviz.python_values import (
    Classes,
    Images,
    Values,
    Versus,
    class_words,
    names_of_methods,
    one_class,
)
from vitviz.python_words import in_python_words

__all__ = ["compare"]


@in_python_words
def compare(
    model: Model,
    images: Images,
    *,
    methods: str | Iterable[str] = DEFAULT_COLUMNS,
    classes: Classes = "top1",
    versus: Versus = None,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
    errors: str = "raise",
) -> list[Sheet]:
    """Draw methods side by side: a sheet for each image, classes by methods.

    Args:
        model: From ``load_model``; it is left as it was.
        images: As for ``rollout``.
        methods: Names as for ``evaluate``, ``evidence`` or ``evidence@2``.
        classes: As for ``relevance``.
        versus: As for ``relevance``.
        fit: As for ``rollout``.
        value_range: As for ``rollout``.
        batch_size: As for ``rollout``.
        pictures: As for ``rollout``; None: pictures of a sheet are at most 512 pixels long.
        errors: As for ``rollout``.

    Returns:
        One for each image; its ``panel()`` draws the sheet, its ``columns`` hold the maps.

    Raises:
        VitvizError: An option or an image is not usable.
    """
    comparison = Comparison.of(
        names_of_methods(methods), class_words(classes), one_class("versus", versus)
    )
    found = explain(
        *(model, images, comparison),
        fit=Fit(fit),
        value_range=value_range,
        batch_size=batch_size,
        pictures=pictures or PictureOptions(max_size=512),
        errors=errors,
        finish=partial(compared, comparison=comparison),
    )
    return cast("list[Sheet]", list(found))
