"""What the programs that `barrier_machine` runs are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Label = str  # "k 3": K of page 3
Reads = tuple[tuple[str, Label], ...]  # regions and what they must hold


class Wait(NamedTuple):
    """Until the mbarrier's phase of this parity has completed; `round` is the phase that is meant, from 0."""

    barrier: str
    parity: int
    round: int


class Arrive(NamedTuple):
    """One arrival on an mbarrier, on behalf of data `label`."""

    barrier: str
    label: Label


@dataclass(frozen=True, eq=False)  # hashed in every state: by identity
class Copy:
    """Start an asynchronous copy into regions; its completion arrives on the mbarrier."""

    regions: tuple[str, ...]
    label: Label
    barrier: str


class BarArrive(NamedTuple):
    """One arrival on a named barrier."""

    barrier: str
    label: Label


class BarWait(NamedTuple):
    """Until the named barrier's round that this program has arrived in is complete."""

    barrier: str


class Store(NamedTuple):
    regions: tuple[str, ...]
    label: Label


class Fence(NamedTuple):
    """This program's stores so far become visible to MMAs and copies, and its loads are over. `label` says which stores
    or loads are meant."""

    label: Label


class Load(NamedTuple):
    """Into registers, which it may take until the next Fence or Mma; or, `until_arrival`, until this program's next
    arrival. That is for regions that only ordinary stores overwrite: an arrival releases, so those come after loads
    before it, whereas a copy writes by another proxy."""

    region: str
    label: Label
    until_arrival: bool = False


class Mma(NamedTuple):
    """Issue this warp's share of an MMA."""

    reads: Reads


class MmaWait(NamedTuple):
    """Until this warp's MMAs have completed, the last being that of `label`; later ones may still read `pending`."""

    label: Label
    pending: Reads = ()


Step = Wait | Arrive | Copy | BarArrive | BarWait | Store | Fence | Load | Mma | MmaWait


@dataclass(frozen=True)
class Protocol:
    """What runs: programs by name, and how many arrivals complete a barrier; and of mbarriers in the shared memory of a
    thread block that may end before others have, the programs of that block."""

    programs: Mapping[str, Sequence[Step]]
    mbarriers: Mapping[str, int]
    named_barriers: Mapping[str, int]
    block_of: Mapping[str, Sequence[str]] = field(default_factory=dict)
