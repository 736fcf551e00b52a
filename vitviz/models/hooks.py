"""Forward hooks on parts of a model: registered to record a run, and removed afterwards."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from vitviz.models.prepared import prepared

__all__ = ["ModelCapture", "hooked"]

_Capture = TypeVar("_Capture", bound="ModelCapture")


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Register hooks one by one; remove them in the end, also if registering a later one fails."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


class ModelCapture(ABC):
    """Records something of every forward pass of a model made inside ``with``.

    Inside, the model is in evaluation mode, fused attention is on (TIMM_FUSED_ATTN=0 switches it
    off), no block runs twice to save memory, and no parameter asks for a gradient; outside it is
    as it was, also after an error. It records what the thread that entered it runs, and other
    threads inside ``recording``, each for itself; with ``attached``, only the latter.
    """

    def __init__(self, module: nn.Module) -> None:
        """Prepare the capture of a module."""
        self._module = module
        self._of_thread = threading.local()
        self._stack = ExitStack()

    def __enter__(self: _Capture) -> _Capture:
        """Start recording."""
        with ExitStack() as stack:
            stack.enter_context(self.attached())
            stack.enter_context(self.recording())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop recording and leave the model as it was."""
        self._stack.close()

    @contextmanager
    def attached(self: _Capture) -> Iterator[_Capture]:
        """Prepare the model, but record nothing outside ``recording``: seeing calls takes time."""
        with prepared(self._module), hooked(self._hooks()):
            yield self

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread runs; threads do not see each other's records. May be nested."""
        if self._is_recording:
            yield
            return
        self._begin()
        try:
            yield
        finally:
            vars(self._of_thread).clear()

    @abstractmethod
    def _hooks(self) -> Iterator[RemovableHandle]:
        """Register the hooks, yielding the handle of each."""

    @abstractmethod
    def _begin(self) -> None:
        """Start this thread's records, empty."""

    @property
    def _is_recording(self) -> bool:
        """Whether this thread is inside; hooks are called in all threads that run the model."""
        return bool(vars(self._of_thread))
