"""Channels that can only go together: which they are, and why they may have to stay."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from torch import Tensor


class Kept(StrEnum):
    """Why channels cannot be removed.

    Example: `Kept.OUTPUT.value`
    """

    PADDED = "they run through a shortcut padded with zero channels, whose places are fixed"
    TRANSPOSED = "a layer among them is a transposed convolution, which this does not cut"
    NORMED = "a layer norm takes its mean over them"
    OUTPUT = "they are the network's output"
    SPLIT = "a layer that makes or reads them splits them, as attention does with its heads"
    MIXED = "an operation among them mixes its channels, or is not known here"
    FIXED = ("the forward splits or regroups them in numbers that it fixes, so that it does not "
             "run without some of them")
    OTHER = "a parameter or module that this does not cut holds one number for each of them"
    GROUPED = "they run through convolutions of groups that do not divide each other"


@dataclass(frozen=True, eq=False)
class Group:
    """Coupled channels. layer: the first that makes them; each map goes from a layer's name to the
    places, within that layer, of each of the group's channels, int64 (channels, places).

    unit: what one of them is, "channel", "neuron" (of a linear layer) or "head". made_by: layers
    whose output channels they are; normed_by: batch norms over them; read_by: layers whose input
    channels they are (several places a channel, where an image was flattened or a head has several
    numbers); a place of -1 stands where a layer has fewer of a channel than of others. With a
    grouped convolution, one "channel" means one from each group, so that groups keep equal sizes.
    kept: why they cannot be removed, or None. numbers: attributes of modules that count them, by
    dotted name.

    Example: `coupling.groups(model, x)[0].channels`
    """

    layer: str
    channels: int
    made_by: Mapping[str, Tensor]
    normed_by: Mapping[str, Tensor]
    read_by: Mapping[str, Tensor]
    kept: Kept | None = None
    unit: str = "channel"
    numbers: Mapping[str, int] = field(default_factory=dict)

    def places(self, kind: str, name: str, channels: Sequence[int]) -> Tensor:
        """Where these channels stand in a layer, int64 (n,). kind: "made_by", "normed_by" or
        "read_by"."""
        found = getattr(self, kind)[name][list(channels)].flatten()
        return found[found >= 0]

    def parted(self, parts: int) -> "Group":
        """The same with fewer channels, each of them one of each of `parts` equal parts of
        these."""
        def joined(at: Tensor) -> Tensor:  # (channels, k) -> (channels / parts, parts * k)
            return at.view(parts, -1, at.shape[1]).transpose(0, 1).reshape(self.channels // parts,
                                                                           -1)

        made, normed, read = ({name: joined(at) for name, at in places.items()}
                              for places in (self.made_by, self.normed_by, self.read_by))
        return replace(self, channels=self.channels // parts, made_by=made, normed_by=normed,
                       read_by=read)

    def forms(self, parts: Sequence[int]) -> Iterator["Group"]:
        """The group itself, then in as many parts as divide it."""
        yield self
        yield from (self.parted(n) for n in parts if not self.channels % n)
