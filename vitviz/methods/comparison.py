"""Several methods on one image: what they are and which classes they explain; draws nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vitviz.errors import OptionError
from vitviz.methods.method import ClassMethod, Method, TokenMap
from vitviz.methods.table import NamedMethod, method_names, named_method

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.methods.forward import ForwardPass, Target
    from vitviz.models.model import Model

__all__ = ["DEFAULT_COLUMNS", "Comparison"]

DEFAULT_COLUMNS = ("rollout", "relevance", "evidence")


@dataclass(frozen=True, kw_only=True)
class Comparison(Method):
    """Several methods side by side, of the same classes.

    Attributes:
        columns: The methods, each with the classes.
        classes: Class requests as typed.
        versus: The class that each is compared with, as typed.
    """

    name: ClassVar[str] = "compare"
    help: ClassVar[str] = "Draw methods side by side: a sheet for each image, classes by methods."
    follows_attention: ClassVar[bool] = False

    columns: tuple[NamedMethod, ...]
    classes: tuple[str, ...] = ("top1",)
    versus: str | None = None

    @classmethod
    def of(
        cls, words: Iterable[str], classes: tuple[str, ...], versus: str | None = None
    ) -> Comparison:
        """Read the names of methods, which commas may part, and let each explain the classes.

        Raises:
            OptionError: There is no such method, none at all, or none for ``versus``.
        """
        columns: list[NamedMethod] = []
        for name in method_names(words):
            named = named_method(name)
            if isinstance(named.method, ClassMethod):
                asked = replace(named.method, classes=classes, versus=versus)
                named = replace(named, method=asked)
            if named.method not in (each.method for each in columns):
                columns.append(named)
        if not columns:
            raise OptionError("no method to compare; give --methods relevance, say")
        if versus is not None and not any(each.method.explains_class for each in columns):
            names = ", ".join(each.name for each in columns)
            raise OptionError(f"--versus is about classes, which {names} does not explain")
        finest = max(each.method.refine for each in columns)
        return cls(columns=tuple(columns), classes=classes, versus=versus, refine=finest)

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods, in the order of their columns."""
        return tuple(each.method for each in self.columns)

    def to_record(self) -> dict[str, Any]:
        """Return the methods and the classes, for records and provenance."""
        methods = {each.name: each.method.to_record() for each in self.columns}
        versus = {} if self.versus is None else {"versus": self.versus}
        return {"methods": methods, "classes": list(self.classes), **versus}

    def require_layout(self, model: Model) -> None:
        """Make sure that all its methods are defined for a model; raises ``VitvizError``."""
        for each in self.members:
            each.require_layout(model)

    def require_model(self, model: Model) -> None:
        """Make sure of the same, with their options; raises ``OptionError``."""
        for each in self.members:
            each.require_model(model)

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Its ``members`` make the maps, each for itself."""
        raise NotImplementedError
