"""The bundled demo: a small Vision Transformer and the painted scenes that it was trained on.

The model names which of eight shapes a cluttered scene contains. Everything here is made by
this package: `scenes` paints, `train` learns, `evaluate` measures.
"""

__all__ = ["CLASSES"]

CLASSES = ("star", "ring", "cross", "heart", "triangle", "square", "moon", "spiral")
