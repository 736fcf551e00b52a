"""How methods are measured, as options that are checked once, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from vitviz.errors import OptionError
from vitviz.methods.table import method_names, named_method
from vitviz.options import Convention, Fit, ValueRange, require_counts

__all__ = ["EvaluationOptions", "require_matplotlib"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How methods are measured.

    Attributes:
        methods: Names that ``named_method`` reads, without baselines, with commas between them
            or one by one; none: all that suit the model.
        target: The class that maps explain: ``top1``, an index, a label, ``mask`` for each class
            that the image's mask names, or ``truth`` for the image's true class.
        versus: The class that it is compared with: an index, a label or ``topK``; maps and
            scores are of the difference of the two logits then.
        convention: How faithfulness is measured.
        fit: How images are brought to the model's size.
        value_range: Which values of pixels become black and white; None: by the range of their
            type.
        batch_size: Images run at once; None: chosen by the number of tokens.
        workers: Threads for decoding and for locating; None: as many as cores.
        seed: Of the random baseline and of the bootstrap.
        resamples: Bootstrap samples.
    """

    methods: tuple[str, ...] = ()
    target: str = "top1"
    versus: str | None = None
    convention: Convention = Convention.VITVIZ
    fit: Fit = Fit.SQUASH
    value_range: ValueRange | None = None
    batch_size: int | None = None
    workers: int | None = None
    seed: int = 0
    resamples: int = 2000

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: A value is outside its range.
        """
        object.__setattr__(self, "methods", method_names(self.methods))
        for name in self.methods:
            named_method(name)
        require_counts(self.batch_size, self.workers)
        if self.seed < 0:
            raise OptionError(f"--seed is {self.seed}; give a number from 0 up")
        if self.resamples < 1:
            raise OptionError(f"--bootstrap is {self.resamples}; give a number from 1 up")


def require_matplotlib() -> None:
    """Make sure, before the work, that there is something to draw a plot with.

    Raises:
        OptionError: There is not.
    """
    if find_spec("matplotlib") is None:
        raise OptionError(
            "--plot needs matplotlib, which is not installed; try pip install 'vitviz[plot]'"
        )
