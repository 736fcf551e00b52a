"""What torch and trainers put around a model, taken off; never what belongs to the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vitviz.errors import UnsupportedModelError
from vitviz.models.structure import blocks_of, patch_embedding
from vitviz.models.translation import object_config

__all__ = ["logits_of", "make_ordinary", "own_numbers", "unwrapped"]


@contextmanager
def own_numbers() -> Iterator[None]:
    """Leave the caller's autocast and inference mode: a model runs in the numbers it is made of."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the one vision transformer in a wrapper; a module without any, or that is one, itself.

    Raises:
        UnsupportedModelError: There are several, or the wrapper has weights of its own.
    """
    found = dict(_transformers(module))
    if "" in found or not found:
        return found.get("", module)
    name, kind = next(iter(found)), type(module).__name__
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{kind} holds {len(found)} models ({', '.join(found)}); pass one of them"
        )
    held = {id(tensor) for tensor in _tensors(found[name]).values()}
    own = [path for path, tensor in _tensors(module).items() if id(tensor) not in held]
    if own:
        raise UnsupportedModelError(
            f"{kind} has weights of its own ({own[0]}) around the model in {name}, which would be "
            f"left out; pass {name}, or a timm model that does all of it"
        )
    return found[name]


def logits_of(module: nn.Module, output: object) -> Tensor:
    """Return the logits in what a model gives: a tensor, alone or named.

    Raises:
        UnsupportedModelError: It is not to be told which they are.
    """
    answer = output
    if isinstance(answer, Mapping):
        named = answer.get("logits")
        answer = tuple(answer.values()) if named is None else named
    if isinstance(answer, (tuple, list)) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, Tensor):
        return answer
    found = f"a {type(output).__name__}"
    if isinstance(output, Mapping):
        found += f" of {', '.join(map(str, output))}"
    elif isinstance(output, (tuple, list)):
        found += f" of {len(output)}"
    raise UnsupportedModelError(
        f"{type(module).__name__} gives {found}; expected one tensor of logits (batch, classes), "
        "alone or as 'logits' in a dict: return that from its forward"
    )


def make_ordinary(module: nn.Module) -> None:
    """Put ordinary tensors in the place of those made in inference mode, which take no gradient."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in copies:
                    copy = tensor.detach().clone()
                    made = nn.Parameter(copy, requires_grad=tensor.requires_grad)
                    copies[id(tensor)] = made if isinstance(tensor, nn.Parameter) else copy
                tensors[name] = copies[id(tensor)]  # type: ignore[assignment]


def _transformers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost models with blocks behind a patch embedding, by name."""
    compiled = dict(module.named_children()).get("_orig_mod")  # which answers for its wrapper
    if compiled is not None:
        yield from _transformers(compiled, name)
    elif object_config(module) or (blocks_of(module) and patch_embedding(module) is not None):
        yield name, module
    else:
        for child, part in module.named_children():
            yield from _transformers(part, f"{name}.{child}" if name else child)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])
