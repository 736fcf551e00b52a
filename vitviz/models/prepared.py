"""A module prepared for explaining (evaluating, fused, frozen), and put back as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["prepared"]


_PREPARING = threading.Lock()
_PREPARED: WeakKeyDictionary[nn.Module, tuple[int, ExitStack]] = WeakKeyDictionary()


@contextmanager
def prepared(module: nn.Module) -> Iterator[None]:
    """Keep a module as it is to be explained: evaluating, fused, uncompiled, frozen.

    The last of those who ask for it, in whatever thread, puts back what the first one found.
    """
    with _PREPARING:
        users, back = _PREPARED.get(module) or (0, _prepare(module))
        _PREPARED[module] = (users + 1, back)
    try:
        yield
    finally:
        with _PREPARING:
            users, back = _PREPARED.pop(module)
            if users > 1:
                _PREPARED[module] = (users - 1, back)
            else:
                back.close()


def _prepare(module: nn.Module) -> ExitStack:
    """Switch a module over; return what switches it back."""
    modules = list(module.modules())
    with ExitStack() as stack:
        stack.enter_context(_switched(modules, "training", False))
        stack.enter_context(_switched(modules, "fused_attn", True))
        stack.enter_context(_switched(modules, "grad_checkpointing", False))
        stack.enter_context(_switched(modules, "_compiled_call_impl", None))
        stack.enter_context(_switched(module.parameters(), "requires_grad", False))
        return stack.pop_all()


@contextmanager
def _switched(owners: Iterable[Any], name: str, value: bool | None) -> Iterator[None]:
    """Set a switch that some objects have and that stands the other way, and set it back."""
    # Asking a module itself for what it lacks is slow, and most lack most switches.
    having = (owner for owner in owners if name in vars(owner) or hasattr(type(owner), name))
    before = [(owner, getattr(owner, name)) for owner in having]
    others = [(owner, old) for owner, old in before if old is not value]
    try:
        for owner, _ in others:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in others:
            setattr(owner, name, old)
