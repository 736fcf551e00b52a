"""How the bundled model was made: painted scenes, the training on them, and its figures.

The model names which of eight shapes a cluttered scene contains. `scenes` paints, `train` learns,
`evaluate` measures, `samples` writes the scenes that come with the project. The package has the
outcome alone, under `vitviz/demo`.
"""

__all__ = ["CLASSES"]

CLASSES = ("star", "ring", "cross", "heart", "triangle", "square", "moon", "spiral")
