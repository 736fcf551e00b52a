"""Several methods on one image: what they are and which classes they explain; draws nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vitviz.errors import OptionError
from vitviz.methods.method import ClassMethod, Method, TokenMap
from vitviz.methods.rollout import Rollout
from vitviz.methods.table import NamedMethod, named_method

if TYPE_CHECKING:  # these rooms load torch
    from vitviz.methods.forward import ForwardPass, Target
    from vitviz.models.model import Model

__all__ = ["Comparison"]


@dataclass(frozen=True, kw_only=True)
class Comparison(Method):
    """Several methods side by side.

    It makes the maps of one itself, which explains no class; the others follow for the images that
    it could explain.

    Attributes:
        columns: The methods, each with the classes.
        classes: Class requests as typed.
    """

    name: ClassVar[str] = "compare"
    help: ClassVar[str] = "Draw methods side by side: a sheet for each image, classes by methods."
    follows_attention: ClassVar[bool] = False

    columns: tuple[NamedMethod, ...]
    classes: tuple[str, ...] = ("top1",)

    @classmethod
    def of(cls, words: tuple[str, ...], classes: tuple[str, ...]) -> Comparison:
        """Read the names of methods, which commas may part, and let each explain the classes.

        Raises:
            OptionError: There is no such method, or none at all.
        """
        names = dict.fromkeys(name.strip() for word in words for name in word.split(","))
        if not names:
            raise OptionError("no method to compare; give --methods relevance, say")
        columns = []
        for name in names:
            named = named_method(name)
            if isinstance(named.method, ClassMethod):
                named = replace(named, method=replace(named.method, classes=classes))
            columns.append(named)
        made = cls(columns=tuple(columns), classes=classes)
        return replace(made, refine=made.own.refine)

    @property
    def own(self) -> Method:
        """The method whose maps it makes itself."""
        agnostic = (each.method for each in self.columns if not each.method.explains_class)
        return next(agnostic, Rollout())

    def to_record(self) -> dict[str, Any]:
        """Return the methods and the classes, for records and provenance."""
        methods = {each.name: each.method.to_record() for each in self.columns}
        return {"methods": methods, "classes": list(self.classes)}

    def require_model(self, model: Model) -> None:
        """Make sure that its own method is defined for a model; raises ``OptionError``."""
        self.own.require_model(model)

    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Compute the relevance (batch, tokens) of its own method."""
        return self.own.compute(forward, target)
