"""What every method is: its options, what it needs of a forward pass, and what it makes of one.

Options are read for ``--help`` and by editors, so no room of a method loads torch when it is
imported; the mathematics is imported where it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vitviz.errors import OptionError, UnsupportedModelError, evidence_instead
from vitviz.options import AttentionRule, Colormap, Unit

if TYPE_CHECKING:  # these rooms load torch
    from torch import Tensor, nn

    from vitviz.methods.forward import ForwardPass, Target
    from vitviz.models.model import Model

__all__ = [
    "ClassMethod",
    "Method",
    "Option",
    "TokenMap",
    "option",
    "options_of",
    "require_share",
    "require_start",
]


class TokenMap(NamedTuple):
    """What a method makes of a batch.

    Attributes:
        relevance: (batch, tokens), prefix tokens included; of a method with more ``axes`` than
            rows and columns, (batch, …, tokens).
        gradient_norm_product: (batch), ‖x‖·‖∂y/∂x‖ at the last block; None without a class.
    """

    relevance: Tensor
    gradient_norm_product: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """How an option of a method is typed and explained on the command line.

    Attributes:
        help: One sentence.
        metavar: What to call its value; None: its choices, or nothing for a switch.
        flag: Its name there, if not the field's.
        shown_default: What to show as its default, if not its value.
        parse: Reads what was typed, where its type does not say how.
        doc: What the Python documentation says of it.
    """

    help: str
    doc: str
    metavar: str | None = None
    flag: str | None = None
    shown_default: str | None = None
    parse: Callable[[str], Any] | None = None


def option(
    default: Any,
    help: str,
    *,
    doc: str = "",
    metavar: str | None = None,
    flag: str | None = None,
    shown_default: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare an option of a method: a dataclass field that the command line can show."""
    declared = Option(
        help=help,
        doc=doc or help,
        metavar=metavar,
        flag=flag,
        shown_default=shown_default,
        parse=parse,
    )
    return field(default=default, metadata={"option": declared})


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method with its options; a subclass is all that there is to know of one.

    To add a method, write a subclass in a room of its own and name it in ``methods.table``: among
    ``METHODS`` for a command and a function of its own, among ``PUBLISHED`` for ``evaluate`` alone.

    Attributes:
        name: As typed, recorded, and used in the names of files.
        help: What its command does, for users.
        explains_class: Whether its maps are about a class.
        is_signed: Whether relevance above 0 speaks for the class, and below 0 against it.
        colormap: Colours of its pictures by default.
        unit: What the numbers of its colour bars count.
        follows_attention: Whether its maps show where attention goes.
        needs_attention: Whether it chains or shows attention maps, which plain ViTs alone have.
        needs_attention_gradients: Whether attention outputs must be differentiable, from
            ``first_block`` on.
        needs_block_inputs: Whether the tokens that enter each block must be kept, and
            differentiable.
        refine: How many times finer than patches maps are, along each side.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    explains_class: ClassVar[bool] = False
    is_signed: ClassVar[bool] = False
    colormap: ClassVar[Colormap] = Colormap.INFERNO
    unit: ClassVar[Unit] = Unit.AVERAGE
    follows_attention: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = True
    needs_attention_gradients: ClassVar[bool] = False
    needs_block_inputs: ClassVar[bool] = False

    refine: int = option(
        1,
        "Make maps N times finer than patches, from N x N shifted copies of each image.",
        doc="How many times finer than patches maps are, from refine² shifts of each image.",
        metavar="N",
    )

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: A value is outside its range.
        """
        if self.refine < 1:
            raise OptionError(
                f"--refine is {self.refine}; give how many times finer than patches a map is, "
                "from 1 up"
            )

    @classmethod
    def variants(cls) -> Mapping[str, Method]:
        """Return what ``evaluate`` compares of this method, by name."""
        return {cls.name: cls()}

    @property
    def title(self) -> str:
        """What its maps are called in pictures."""
        return self.name

    @property
    def members(self) -> tuple[Method, ...]:
        """The methods that make its maps: itself, or several that explain the same classes."""
        return (self,)

    @property
    def axes(self) -> tuple[str, ...]:
        """What its maps are laid out along."""
        return ("rows", "cols")

    @property
    def is_animated(self) -> bool:
        """Whether its maps are the frames of an animation."""
        return self.axes[0] == "frames"

    @property
    def file_name(self) -> str:
        """What stands for it in the names of files."""
        return self.name

    @property
    def still(self) -> Method:
        """The method of one map, of a method whose maps are the frames of an animation."""
        return self

    def frame_name(self, position: int) -> str:
        """Say what one frame of an animation shows, of a method that has several."""
        return str(position)

    @property
    def first_block(self) -> int:
        """The first block that takes part."""
        return 0

    @property
    def weighs_values(self) -> bool:
        """Whether the matrix that joins the heads of each block must be found."""
        return False

    @property
    def backward_rule(self) -> AttentionRule | None:
        """How a linearised backward pass treats attention; None: the true gradients are used."""
        return None

    @property
    def balances_residuals(self) -> bool:
        """Whether that backward pass also balances residual additions; see ``residuals``."""
        return False

    @property
    def extent(self) -> tuple[float, float] | None:
        """What is drawn coldest and hottest; None: the least and the most of each map."""
        return None

    def to_record(self) -> dict[str, Any]:
        """Return the options that shape its maps, for records and provenance."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        for beside in ("classes", "versus"):  # what a map is about is recorded beside this
            values.pop(beside, None)
        return {
            name: value.value if isinstance(value, Enum) else value
            for name, value in values.items()
        }

    def require_one_map(self) -> None:
        """Make sure that its maps are of rows and columns alone.

        Raises:
            OptionError: They are not.
        """
        if len(self.axes) > 2:
            raise OptionError(
                f"--save gray is of one map per image, but {self.name} gives "
                f"{' × '.join(self.axes)}; use --save npy"
            )

    def require_layout(self, model: Model) -> None:
        """Make sure that a model has the attention maps, and the patches, that are needed.

        Raises:
            UnsupportedModelError: Its attention maps cannot be chained.
            OptionError: It has no patches to refine.
        """
        from vitviz.models.stages import StageLayout

        if not isinstance(model.layout, StageLayout):
            return
        if self.needs_attention:
            raise UnsupportedModelError(evidence_instead(model.layout.reason))
        if self.refine > 1:
            raise OptionError(
                f"--refine is {self.refine}, but {model.name} is no plain ViT, whose patches are "
                "the places of maps; leave it out"
            )

    def require_model(self, model: Model) -> None:  # noqa: B027 (most are defined for all)
        """Make sure that the method is defined for a model.

        Raises:
            OptionError: It is not, with these options.
        """

    def require_grid(self, grid: tuple[int, int]) -> None:  # noqa: B027 (most fit all)
        """Make sure that the options fit maps of these (rows, cols).

        Raises:
            OptionError: They do not.
        """

    def watched(self, model: Model) -> Sequence[nn.Module]:
        """Return the parts of a model whose outputs must be kept, beside what others keep."""
        return ()

    def tokens(self, forward: ForwardPass) -> Tensor:
        """Return the tokens (batch, tokens, channels) whose outliers may spoil its maps."""
        return forward.tokens[-1]

    @abstractmethod
    def compute(self, forward: ForwardPass, target: Target | None) -> TokenMap:
        """Compute the relevance of each token.

        Args:
            forward: What was seen of a forward pass of the batch.
            target: The class to explain; None for a method that explains none.
        """


@dataclass(frozen=True, kw_only=True)
class ClassMethod(Method):
    """A method whose maps are about a class.

    Attributes:
        classes: Class requests as typed: an index, a label, ``top1``, ``top5``.
        versus: The class that each is compared with, as typed: an index, a label, ``top2``.
    """

    explains_class: ClassVar[bool] = True

    classes: tuple[str, ...] = option(
        ("top1",),
        "Class to explain: an index, a label, top1 or topK. Repeatable, one map for each.",
        doc='An index, a label (``"tabby"``), ``"top1"`` or ``"topK"``, or several of these.',
        metavar="C",
        flag="--class",
    )
    versus: str | None = option(
        None,
        "Explain the difference to this class's logit instead: an index, a label, or topK, the "
        "K-th best alone.",
        doc="A class; maps are of the difference of the two logits. An index, a label, or "
        '``"topK"``, the K-th best alone.',
        metavar="C",
    )


def options_of(method: type[Method]) -> list[Field[Any]]:
    """List the fields of a method that are options of its command and its function."""
    return [each for each in fields(method) if "option" in each.metadata]


def require_share(discard: float) -> None:
    """Make sure that a discard ratio is one.

    Raises:
        OptionError: It is not in [0, 1).
    """
    if not 0 <= discard < 1:
        raise OptionError(
            f"--discard is {discard:g}, but it is the share of attention set to zero: "
            "give a number from 0 up to, not including, 1 (0.9, say)"
        )


def require_start(start_layer: int | None) -> None:
    """Make sure that a first block can be one.

    Raises:
        OptionError: It is below 0.
    """
    if start_layer is not None and start_layer < 0:
        raise OptionError(f"--start-layer is {start_layer}; blocks count from 0")
