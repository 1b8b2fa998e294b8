"""How a step's batch is shared out among processes, and within one among its parts."""

from __future__ import annotations

from dataclasses import dataclass

from fastbd.base.errors import UserError


@dataclass(frozen=True)
class Shares:
    """Who takes what of a batch: `processes`, each its part after part; batch norm, `group` images at a time (0: all).

    A pair is `views` images. `norms`: whether the model has a batch norm.
    """

    processes: int
    parts: int
    group: int
    views: int
    norms: bool

    def part(self, batch_size: int) -> int:
        """Pairs of a part of a process's share."""
        return batch_size // self.processes // self.parts

    def check(self, batch_size: int, rows: int) -> None:
        """UserError when a batch of so many of the `rows` pairs cannot be shared out so."""
        if batch_size % (self.processes * self.parts):
            takers = [(self.processes, "processes"), (self.parts, "parts of --accumulate")]
            asked = " times ".join(f"{count} {name}" for count, name in takers if count > 1)
            raise UserError(f"--batch-size {batch_size} is no multiple of the {asked}: choose one that is.")
        if rows < batch_size:
            raise UserError(f"--batch-size {batch_size} is larger than the {rows} pairs there are: make it smaller.")
        images = self.part(batch_size) * self.views
        if self.group and (images % self.group or self.group % self.views):
            raise UserError(
                f"--bn-group {self.group} does not share out the {images} images, {self.views} of a pair, that are "
                f"embedded together: choose a divisor of {images} that is a multiple of {self.views}."
            )
        if self.parts > 1 and self.norms and not self.group:
            raise UserError(
                f"--accumulate {self.parts} needs a number for --bn-group, as batch norm sees one part at a time: a "
                f"divisor of {images} that is a multiple of {self.views}."
            )
