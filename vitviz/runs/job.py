"""What to do with each image of a run, as options that are checked once, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vitviz.errors import OptionError
from vitviz.images.sources import Source
from vitviz.methods.method import Method
from vitviz.methods.rollout import Rollout
from vitviz.options import (
    Fit,
    OutputKind,
    PictureFormat,
    PictureOptions,
    ValueRange,
    Word,
    require_counts,
)
from vitviz.runs.shards import Shard

__all__ = ["Engine", "Job", "require_parquet"]


class Engine(Word):
    """What runs a job."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do with each image.

    Attributes:
        method: How maps are computed.
        pictures: How they become files.
        fit: How images are brought to the model's size.
        value_range: Which values of pixels become black and white; None: by the range of their
            type.
        output: Folder to write to.
        skip_existing: Leave out images whose files are there, made by the same recipe.
        batch_size: Images run at once; None: chosen by the number of tokens.
        workers: Threads for decoding and for writing; None: as many as cores.
        records: Folder of a table with a row for each map; None: no table.
        table: Put the relevance into the table, too.
        shard: Which part of the images is explained; None: all.
    """

    method: Method = Rollout()
    pictures: PictureOptions = PictureOptions()
    fit: Fit = Fit.SQUASH
    value_range: ValueRange | None = None
    output: Path = Path("vitviz-out")
    skip_existing: bool = False
    batch_size: int | None = None
    workers: int | None = None
    records: Path | None = None
    table: bool = False
    shard: Shard | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: A value is outside its range, or does not go with the method.
        """
        require_counts(self.batch_size, self.workers)
        if OutputKind.GRAY in self.pictures.kinds:
            self.method.require_one_map()
        is_animated, format = self.method.is_animated, self.pictures.format
        if is_animated and format not in (PictureFormat.GIF, PictureFormat.WEBP):
            raise OptionError(f"--format {format} has no frames; use gif or webp with --animate")
        if not is_animated and format is PictureFormat.GIF:
            raise OptionError("--format gif is for --animate; use png, jpeg or webp")

    @property
    def destination(self) -> Path | None:
        """Where to look for what was made; None where nothing is written."""
        return self.output if self.pictures.kinds else self.records

    def part_of(self, sources: Sequence[Source]) -> Sequence[Source]:
        """Return the images that this process is to explain."""
        return [each for each in sources if self.shard.holds(each.key)] if self.shard else sources


def require_parquet(folder: Path) -> None:
    """Make sure that a table can be written to.

    Raises:
        OptionError: pyarrow is not installed, or the name is not that of such a table.
    """
    if folder.suffix != ".parquet":
        raise OptionError(f"--records is {folder}; give a name that ends in .parquet")
    if find_spec("pyarrow") is None:
        raise OptionError(
            "--records needs pyarrow, which is not installed; try pip install 'vitviz[parquet]'"
        )
