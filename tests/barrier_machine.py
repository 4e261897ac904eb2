"""An exhaustive model checker for the barrier protocol of a warp-specialised kernel.

A *program* is a list of steps; the machine runs programs side by side in every order there is and follows what the
hardware keeps: mbarriers (parity and arrivals of the open phase), named barriers, asynchronous copies and asynchronous
MMAs, which read shared memory between their issue and their completion. Shared memory is a set of named regions; each
holds a label that says whose data it is, and every read names the label that it expects.

`explore` raises `Violation` when something goes wrong in any order, with the steps that lead there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Label = tuple[str, int]  # ("k", 3): K of page 3
Reads = tuple[tuple[str, Label], ...]  # regions and what they must hold


class Violation(Exception):
    """The protocol fails in some order of execution."""


class Wait(NamedTuple):
    """Until the mbarrier's phase of this parity has completed; `round` is the phase that is meant, from 0."""

    barrier: str
    parity: int
    round: int


class Arrive(NamedTuple):
    """One arrival on an mbarrier, on behalf of data `label`."""

    barrier: str
    label: Label


class Copy(NamedTuple):
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


class Load(NamedTuple):
    region: str
    label: Label


class Mma(NamedTuple):
    """Issue an MMA of the program's warpgroup; it starts once every warp of the group has issued it."""

    reads: Reads


class MmaWait(NamedTuple):
    """Until at most `pending` of this warp's MMAs have not completed."""

    pending: int


Step = Wait | Arrive | Copy | BarArrive | BarWait | Store | Load | Mma | MmaWait


WAITS = (Wait, BarWait, MmaWait)


@dataclass(frozen=True)
class Protocol:
    """What runs: programs by name, the MMA group each warp belongs to, and how many arrivals complete a barrier."""

    programs: Mapping[str, Sequence[Step]]
    groups: Mapping[str, str]  # program -> warpgroup, for those that issue MMAs
    mbarriers: Mapping[str, int]
    named_barriers: Mapping[str, int]


Round = tuple[frozenset[str], Label | None]  # who has arrived in the open round of a barrier, and for what
Flying = tuple[tuple[Reads, frozenset[str]], ...]  # MMAs in order: what they read, which warps have issued them
NOBODY: Round = (frozenset(), None)


@dataclass
class State:
    """One moment. Keys never change, so that the values alone tell states apart."""

    at: dict[str, int]  # program -> next step
    memory: dict[str, Label | None]
    phases: dict[str, int]  # mbarrier -> completed phases
    arrived: dict[str, Round]  # mbarriers and named barriers
    issued: dict[str, int]  # warp -> MMAs
    flying: dict[str, Flying]  # group -> MMAs
    completed: dict[str, int]  # group -> MMAs
    copies: frozenset[Copy] = frozenset()

    def copy(self) -> State:
        at, memory, phases, arrived, issued, flying, completed = (d.copy() for d in self._dicts())
        return State(at, memory, phases, arrived, issued, flying, completed, self.copies)

    def key(self) -> tuple[Any, ...]:
        return (*(tuple(d.values()) for d in self._dicts()), self.copies)

    def _dicts(self) -> tuple[dict[str, Any], ...]:
        return (self.at, self.memory, self.phases, self.arrived, self.issued, self.flying, self.completed)


def explore(protocol: Protocol) -> int:
    """Run every order; returns the number of states. Raises Violation."""
    return _Machine(protocol).explore()


class _Machine:
    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.programs = protocol.programs
        self.group_size = {
            group: sum(g == group for g in protocol.groups.values()) for group in protocol.groups.values()
        }

    def explore(self) -> int:
        start = self._start()
        self._settle(start)
        first = start.key()
        origin: dict[Any, tuple[Any, str] | None] = {first: None}
        queue = deque([(first, start)])
        while queue:
            key, state = queue.popleft()
            moves = 0
            try:
                for move, successor in self._moves(state):
                    moves += 1
                    successor_key = successor.key()
                    if successor_key not in origin:
                        origin[successor_key] = (key, move)
                        queue.append((successor_key, successor))
                if moves == 0:
                    self._check_end(state)
            except Violation as violation:
                raise Violation(f"{violation}\nafter:\n  " + "\n  ".join(_trail(origin, key))) from None
        return len(origin)

    def _start(self) -> State:
        mbarriers, groups = self.protocol.mbarriers, self.protocol.groups
        return State(
            at=dict.fromkeys(self.programs, 0),
            memory=dict.fromkeys(sorted({r for steps in self.programs.values() for s in steps for r in _regions(s)})),
            phases=dict.fromkeys(mbarriers, 0),
            arrived=dict.fromkeys([*mbarriers, *self.protocol.named_barriers], NOBODY),
            issued=dict.fromkeys(groups, 0),
            flying=dict.fromkeys(groups.values(), ()),
            completed=dict.fromkeys(groups.values(), 0),
        )

    def _moves(self, state: State) -> Iterable[tuple[str, State]]:
        for name, steps in self.programs.items():
            if state.at[name] == len(steps):
                continue
            step = steps[state.at[name]]
            successor = state.copy()
            successor.at[name] += 1
            if self._perform(successor, name, step):
                self._settle(successor)
                yield f"{name}: {step}", successor
        for copy in state.copies:
            successor = state.copy()
            successor.copies = state.copies - {copy}
            successor.memory.update(dict.fromkeys(copy.regions, copy.label))
            self._arrive(successor, f"copy of {copy.label}", copy.barrier, copy.label)
            self._settle(successor)
            yield f"copy of {copy.label} into {copy.regions} completes", successor
        for group, flying in state.flying.items():
            if flying and len(flying[0][1]) == self.group_size[group]:
                successor = state.copy()
                self._check_reads(successor, flying[0][0], f"{group}'s MMA")
                successor.flying[group] = flying[1:]
                successor.completed[group] += 1
                self._settle(successor)
                yield f"{group}'s MMA completes", successor

    def _perform(self, state: State, name: str, step: Any) -> bool:
        """Change the state by one step; False if it has to wait."""
        match step:
            case Wait():
                return self._has_completed(state, name, step)
            case Arrive(barrier, label):
                self._arrive(state, name, barrier, label)
            case BarArrive(barrier, label):
                self._bar_arrive(state, name, barrier, label)
            case BarWait(barrier):
                return name not in state.arrived[barrier][0]
            case Copy(regions, label, _):
                for region in regions:
                    self._check_unread(state, region, f"copy of {label}")
                    state.memory[region] = ("loading", label[1])
                state.copies |= {step}
            case Store(regions, label):
                for region in regions:
                    self._check_unread(state, region, f"{name}'s store of {label}")
                    state.memory[region] = label
            case Load(region, label):
                self._check_reads(state, ((region, label),), f"{name}'s load")
            case Mma(reads):
                self._issue(state, name, reads)
            case MmaWait(pending):
                group = self.protocol.groups[name]
                return state.issued[name] - state.completed[group] <= pending
        return True

    def _settle(self, state: State) -> None:
        """Take waits that are over at once: fewer orders, the same outcomes. `_check_overrun` covers the late ones."""
        for name, steps in self.programs.items():
            while state.at[name] < len(steps):
                step = steps[state.at[name]]
                if not (isinstance(step, WAITS) and self._perform(state, name, step)):
                    break
                state.at[name] += 1

    def _check_overrun(self, state: State, barrier: str) -> None:
        """A program that has just passed a wait might as well stand before it still, and must then pass it later."""
        phases = state.phases[barrier]
        for name, steps in self.programs.items():
            at = state.at[name]
            while at > 0 and isinstance(step := steps[at - 1], WAITS):
                if isinstance(step, Wait) and step.barrier == barrier and phases != step.round + 1:
                    raise Violation(
                        f"{name} may still wait for phase {step.round} of {barrier}, and phase {phases - 1} completes"
                    )
                at -= 1

    def _has_completed(self, state: State, name: str, wait: Wait) -> bool:
        phases = state.phases[wait.barrier]
        if phases not in (wait.round, wait.round + 1):
            raise Violation(f"{name} waits for phase {wait.round} of {wait.barrier}, which is in phase {phases}")
        passes = phases % 2 != wait.parity
        if passes != (phases == wait.round + 1):
            raise Violation(f"{name}: parity {wait.parity} of {wait.barrier} stands for another phase ({wait.round})")
        return passes

    def _arrive(self, state: State, name: str, barrier: str, label: Label) -> None:
        if self._round_completes(state, name, barrier, label, self.protocol.mbarriers[barrier]):
            state.phases[barrier] += 1
            self._check_overrun(state, barrier)

    def _bar_arrive(self, state: State, name: str, barrier: str, label: Label) -> None:
        self._round_completes(state, name, barrier, label, self.protocol.named_barriers[barrier])

    def _round_completes(self, state: State, name: str, barrier: str, label: Label, needed: int) -> bool:
        arrived, of = state.arrived[barrier]
        if name in arrived or of not in (None, label):
            raise Violation(f"{name} arrives at {barrier} for {label} while the round for {of} is open")
        arrived |= {name}
        complete = len(arrived) == needed
        state.arrived[barrier] = NOBODY if complete else (arrived, label)
        return complete

    def _issue(self, state: State, name: str, reads: Reads) -> None:
        group = self.protocol.groups[name]
        flying = state.flying[group]
        index = state.issued[name] - state.completed[group]
        state.issued[name] += 1
        self._check_reads(state, reads, f"{name}'s MMA")
        if index == len(flying):
            state.flying[group] = (*flying, (reads, frozenset({name})))
            return
        issued_reads, issuers = flying[index]
        if issued_reads != reads:
            raise Violation(f"{name} issues an MMA other than the one its warpgroup has begun")
        state.flying[group] = (*flying[:index], (reads, issuers | {name}), *flying[index + 1 :])

    def _check_reads(self, state: State, reads: Reads, who: str) -> None:
        for region, label in reads:
            if state.memory[region] != label:
                raise Violation(f"{who} expects {label} in {region}, which holds {state.memory[region]}")

    def _check_unread(self, state: State, region: str, who: str) -> None:
        for group, flying in state.flying.items():
            if any(region == read for reads, _ in flying for read, _ in reads):
                raise Violation(f"{who} overwrites {region}, which an MMA of {group} is reading")
        if any(region in copy.regions for copy in state.copies):
            raise Violation(f"{who} overwrites {region}, into which a copy is in flight")

    def _check_end(self, state: State) -> None:
        stuck = {
            name: str(steps[state.at[name]]) for name, steps in self.programs.items() if state.at[name] < len(steps)
        }
        if stuck:
            raise Violation(f"deadlock: {stuck}")
        if still_open := {barrier: of for barrier, of in state.arrived.items() if of != NOBODY}:
            raise Violation(f"the programs end with open rounds: {still_open}")


def _regions(step: Any) -> tuple[str, ...]:
    match step:
        case Copy() | Store():
            return step.regions
        case Load():
            return (step.region,)
        case Mma():
            return tuple(region for region, _ in step.reads)
    return ()


def _trail(origin: Mapping[Any, tuple[Any, str] | None], key: Any) -> list[str]:
    moves: list[str] = []
    while (step := origin[key]) is not None:
        key, move = step
        moves.append(move)
    return moves[::-1]
