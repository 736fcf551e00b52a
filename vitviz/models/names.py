"""Names that a user gives a model; builds nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path

from vitviz.errors import ModelError

__all__ = ["ALIASES", "DEFAULT", "FACTORY", "require_name", "resolve_name"]


ALIASES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "dinov2_small": "vit_small_patch14_dinov2",
    "dinov2_base": "vit_base_patch14_dinov2",
    "dinov2_large": "vit_large_patch14_dinov2",
}


_TORCHVISION = {"b": "base", "l": "large", "h": "huge"}

DEFAULT = "deit_tiny"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function


def require_name(name: str, known: Collection[str]) -> str:
    """Make sure that a name can be a model's; names that need no list of models always can.

    Args:
        name: As typed.
        known: timm's names, without tags.

    Returns:
        The name without its tag, aliases replaced; empty where it is no name of timm's.

    Raises:
        ModelError: There is no such model; near names are offered.
    """
    if name == "demo" or name.startswith(("hf-hub:", "local-dir:")) or FACTORY.fullmatch(name):
        return ""
    if Path(name).is_dir():
        return ""
    base = name.partition(".")[0]
    base = ALIASES.get(base, base)
    if base not in known:
        near = difflib.get_close_matches(name, ["demo", *ALIASES, *known], n=3, cutoff=0.5)
        offers = (_of_others(name), f"did you mean {', '.join(near)}?" if near else "")
        hint = "; ".join(filter(None, offers)) or "`vitviz models` lists timm's"
        raise ModelError(f"no model is called {name!r}; {hint}")
    return base


def _of_others(name: str) -> str:
    """Say what timm calls a model that goes by a name of the hub's or of torchvision's."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return f"a model on the hub is called hf-hub:{name}"
    if theirs := re.fullmatch(r"vit_([blh])_(14|16|32)", name):
        timms = f"vit_{_TORCHVISION[theirs[1]]}_patch{theirs[2]}_224"
        return f"that is torchvision's name; timm's is {timms}"
    return ""


def resolve_name(name: str) -> str:
    """Return the full name of a model for timm, aliases replaced.

    Raises:
        ModelError: timm knows no such model; near names are offered.
    """
    import timm  # here, so that a misspelt name is found without it

    base = require_name(name, timm.list_models())
    if not base:
        return f"local-dir:{name}" if Path(name).is_dir() and ":" not in name else name
    _, dot, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        raise ModelError(f"{base} has no weights tagged {tag!r}; tags it has: {known}")
    return base + dot + tag
