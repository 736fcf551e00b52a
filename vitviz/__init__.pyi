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

def rollout(
    model: Model,
    images: Images,
    *,
    discard: float = 0.9,
    start_layer: int = 0,
    animate: str | None = None,
    head_fusion: HeadFusion | str = HeadFusion.MAX,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
    errors: str = "raise",
) -> list[Explanation]:
    """Attention rollout, which knows no class (Abnar & Zuidema 2020, arXiv 2005.00928)."""

def grad_rollout(
    model: Model,
    images: Images,
    *,
    classes: Classes = ("top1",),
    versus: Versus = None,
    discard: float = 0.9,
    start_layer: int = 0,
    animate: str | None = None,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
    errors: str = "raise",
    target: Target | None = None,
) -> list[Explanation]:
    """Rollout of attention weighted with the gradient of a class's logit."""

def relevance(
    model: Model,
    images: Images,
    *,
    classes: Classes = ("top1",),
    versus: Versus = None,
    classic: bool = False,
    start_layer: int | None = None,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
    errors: str = "raise",
    target: Target | None = None,
) -> list[Explanation]:
    """Gradient relevance with a linearised backward pass and weighted values."""

def evidence(
    model: Model,
    images: Images,
    *,
    classes: Classes = ("top1",),
    versus: Versus = None,
    rule: AttentionRule | str = AttentionRule.VALUE,
    residual: ResidualRule | str = ResidualRule.BALANCED,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
    errors: str = "raise",
    target: Target | None = None,
) -> list[Explanation]:
    """Signed evidence for a class: x ⊙ ∂y/∂x at all blocks, with a linearised backward pass."""

def attention(
    model: Model,
    images: Images,
    *,
    query: tuple[int, int] | None = None,
    refine: int = 1,
    fit: Fit | str = Fit.SQUASH,
    value_range: Values = None,
    batch_size: int | None = None,
    pictures: PictureOptions | None = None,
    errors: str = "raise",
) -> list[Explanation]:
    """Raw attention, blocks and heads apart; it draws itself as a contact sheet."""
