"""What the maps of a batch are about, as numbers y to differentiate; never runs a model.

y is the logit of a class, the difference of the logits of two, or a score of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitviz.errors import OptionError
from vitviz.methods.method import ClassMethod
from vitviz.models.labels import ClassRequest
from vitviz.models.model import Model

__all__ = ["own_request", "require_target", "scores_of", "targets_of", "without_equals"]


def require_target(target: Callable[[Any], Any], logits: Tensor) -> None:
    """Make sure that a function makes one differentiable score of each image's logits.

    Args:
        target: Of logits (batch, classes) to scores (batch).
        logits: (2, classes) to try it on.

    Raises:
        OptionError: It makes something else of them.
    """
    if not callable(target):
        raise OptionError(f"target is {target!r}; give a function of logits (batch, classes)")
    tried = logits.detach().requires_grad_()
    with torch.enable_grad():
        scores = target(tried)
    expected = "expected one score for each image, (batch), of logits (batch, classes)"
    if not isinstance(scores, Tensor):
        raise OptionError(f"target gives {type(scores).__name__}; {expected}, as a tensor")
    if scores.shape != tried.shape[:1]:
        raise OptionError(f"target makes {tuple(scores.shape)} of {tuple(tried.shape)}; {expected}")
    gradient = None
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(scores[0], tried, allow_unused=True)
    if gradient is None:
        raise OptionError(
            "target gives scores that have no gradient, as argmax or a comparison do; give a "
            "differentiable function of the logits"
        )
    if gradient[1].nan_to_num().any():  # not a number, as of a logarithm, is no dependence
        raise OptionError("target mixes the images of a batch; give a function of each row alone")


def own_request(
    model: Model, method: ClassMethod, target: Callable[[Any], Any]
) -> tuple[ClassRequest, ...]:
    """Make sure of a score of the user's own, and ask for it.

    Args:
        model: The model whose logits the score is of.
        method: The method that explains it.
        target: Of logits (batch, classes) to scores (batch).

    Raises:
        OptionError: Classes are asked for as well, or it is no score; see ``require_target``.
    """
    if method.versus is not None or method.classes != ("top1",):
        raise OptionError(
            "target is what is explained in place of a class; leave --class and --versus out"
        )
    numbers = torch.linspace(-1, 1, 2 * model.num_classes, device=model.device)
    require_target(target, numbers.view(2, -1).to(model.dtype))
    return (ClassRequest(score=target),)


def targets_of(logits: Tensor, requests: Sequence[ClassRequest], given: Tensor) -> Tensor:
    """Return the classes that maps are about, ranks resolved per image.

    Args:
        logits: (batch, classes).
        requests: What is asked for.
        given: (batch, maps, 1 or 2), the classes in place of those asked for; no maps where the
            requests have the word.

    Returns:
        (batch, maps, 1), the class of each map; (batch, maps, 2) with the one that it is compared
        with; (batch, 1, 0) for a score of the user's own.
    """
    if requests[0].score is not None:
        return torch.empty(len(logits), 1, 0, dtype=torch.long)
    ranked = logits.argsort(dim=1, descending=True, stable=True)
    if given.shape[1]:
        classes = given
    else:
        classes = torch.stack([_resolved(ranked, each) for each in requests], dim=1).unsqueeze(2)
    versus = requests[0].versus  # of all requests the same
    if versus is None or classes.shape[2] == 2:
        return classes
    other = _resolved(ranked, versus).view(-1, 1, 1).expand_as(classes)
    return torch.cat([classes, other], dim=2)


def scores_of(output: Tensor, targets: Tensor, requests: Sequence[ClassRequest]) -> Tensor:
    """Compute y (batch, maps) of the model's output (batch, classes)."""
    if requests[0].score is not None:
        scores: Tensor = requests[0].score(output)
        return scores.unsqueeze(1)
    own, *other = (output.gather(1, each) for each in targets.to(output.device).unbind(dim=2))
    return own - other[0] if other else own


def without_equals(relevance: Tensor, targets: Tensor) -> Tensor:
    """Draw nothing (batch, maps, ...) where a class is compared with itself, as ranks can be."""
    if targets.shape[2] < 2:
        return relevance
    same = (targets[..., 0] == targets[..., 1]).to(relevance.device)
    return relevance.masked_fill(same.view(*same.shape, *(1,) * (relevance.ndim - 2)), 0)


def _resolved(ranked: Tensor, request: ClassRequest) -> Tensor:
    """Return the class (batch) of a request, of the classes (batch, classes) by their rank."""
    if request.class_index is None:
        return ranked[:, request.rank - 1]
    return torch.full_like(ranked[:, 0], request.class_index)
