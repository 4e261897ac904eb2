"""An exhaustive model checker for the barrier protocol of a warp-specialised kernel.

A *program* is a list of steps; the machine runs programs side by side in every order there is and follows what the
hardware keeps: mbarriers (parity and arrivals of the open phase), named barriers, asynchronous copies, and asynchronous
MMAs, which read shared memory from their issue until their warp has waited for them: a warp's wait speaks for its own
share only. Shared memory is a set of named regions; each holds a label that says whose data it is, and every read names
the label that it expects. Ordinary stores must be fenced before an MMA or a copy touches what they wrote; ordinary
loads may be overtaken by an arrival, until a fence or an MMA that needs the registers, unless only ordinary stores
overwrite what they read.

`explore` raises `Violation` when something goes wrong in any order, with the steps that lead there. Programs take turns
after arrivals and before waits only: between these they do nothing that lets another one go on, so a conflict with
another one shows in one of the orders that are left. Where these are too many, `sample` runs some of them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tests.barrier_steps import (
    Arrive,
    BarArrive,
    BarWait,
    Copy,
    Fence,
    Label,
    Load,
    Mma,
    MmaWait,
    Protocol,
    Reads,
    Step,
    Store,
    Wait,
)

WAITS = (Wait, BarWait)
BEGINS_TURN = (*WAITS, MmaWait)
ENDS_TURN = (Arrive, BarArrive)


class Violation(Exception):
    """The protocol fails in some order of execution."""


IN_FLIGHT: Label = "a copy in flight"
Round = tuple[frozenset[str], Label | None]  # who has arrived in the open round of a barrier, and for what
NOBODY: Round = (frozenset(), None)


Key = tuple[tuple[int, ...], tuple[Label | None, ...], frozenset[Copy]]
Origin = dict[Key, tuple[Key, str] | None]  # state -> the one before it, and the move between them


@dataclass
class State:
    """One moment."""

    at: dict[str, int]  # program -> next step
    memory: dict[str, Label | None]
    phases: dict[str, int]  # mbarrier -> completed phases
    arrived: dict[str, Round]  # mbarriers and named barriers
    reading: dict[str, frozenset[str]]  # program -> regions that its MMAs in flight read
    loading: dict[str, frozenset[str]]  # program -> regions that its loads in flight read
    unfenced: dict[str, frozenset[str]]  # program -> regions that it has stored to since its last fence
    copies: frozenset[Copy] = frozenset()

    def copy(self) -> State:
        return State(
            self.at.copy(),
            self.memory.copy(),
            self.phases.copy(),
            self.arrived.copy(),
            self.reading.copy(),
            self.loading.copy(),
            self.unfenced.copy(),
            self.copies,
        )

    def key(self) -> Key:
        """Tells states apart: keys never change, and what the other members hold follows from how far all have got."""
        return (tuple(self.at.values()), tuple(self.memory.values()), self.copies)


def explore(protocol: Protocol) -> int:
    """Run every order; returns the number of states. Raises Violation."""
    return _Machine(protocol).explore()


def sample(protocol: Protocol, walks: int, seed: int = 0) -> None:
    """Run that many orders, each drawn at random. Raises Violation."""
    order = random.Random(seed)
    for _ in range(walks):
        _Machine(protocol).walk(order)


class _Machine:
    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.programs = protocol.programs
        loads = [step for steps in self.programs.values() for step in steps if isinstance(step, Load)]
        self.read_until_arrival = frozenset(load.region for load in loads if load.until_arrival)

    def explore(self) -> int:
        start = self._start()
        first = start.key()
        origin: Origin = {first: None}
        queue = deque([(first, start)])
        while queue:
            key, state = queue.popleft()
            moves = 0
            try:
                for choice in self._choices(state):
                    move, successor = self._after(state, choice)
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

    def walk(self, order: random.Random) -> None:
        state = self._start()
        # Some are far quicker than others, or all would always be about as far as each other.
        pace: dict[str | Copy, float] = {}
        moves: list[str] = []
        try:
            while choices := self._choices(state):
                paces = [pace.setdefault(choice, 10 ** order.uniform(-3, 0)) for choice in choices]
                move, state = self._after(state, order.choices(choices, paces)[0])
                moves.append(move)
            self._check_end(state)
        except Violation as violation:
            raise Violation(f"{violation}\nafter:\n  " + "\n  ".join(moves)) from None

    def _start(self) -> State:
        mbarriers = self.protocol.mbarriers
        start = State(
            at=dict.fromkeys(self.programs, 0),
            memory=dict.fromkeys(sorted({r for steps in self.programs.values() for s in steps for r in _regions(s)})),
            phases=dict.fromkeys(mbarriers, 0),
            arrived=dict.fromkeys([*mbarriers, *self.protocol.named_barriers], NOBODY),
            reading=dict.fromkeys(self.programs, frozenset()),
            loading=dict.fromkeys(self.programs, frozenset()),
            unfenced=dict.fromkeys(self.programs, frozenset()),
        )
        self._settle(start)
        return start

    def _choices(self, state: State) -> list[str | Copy]:
        """Programs that can take a turn, and copies that can complete."""
        at = state.at
        can_go = [n for n, steps in self.programs.items() if at[n] < len(steps) and not isinstance(steps[at[n]], WAITS)]
        return [*can_go, *sorted(state.copies, key=lambda copy: (copy.barrier, copy.regions))]

    def _after(self, state: State, choice: str | Copy) -> tuple[str, State]:
        """What that does, and the next moment."""
        successor = state.copy()
        if isinstance(choice, Copy):
            what = f"copy of {choice.label} into {choice.regions}"
            move = f"{what} completes"
            successor.copies = state.copies - {choice}
            successor.memory.update(dict.fromkeys(choice.regions, choice.label))
            self._arrive(successor, what, choice.barrier, choice.label)
        else:
            turn = _turn(self.programs[choice], state.at[choice])
            move = f"{choice}: {'; '.join(map(str, turn))}"
            for step in turn:
                self._perform(successor, choice, step)
            successor.at[choice] += len(turn)
        self._settle(successor)
        return move, successor

    def _perform(self, state: State, name: str, step: Step) -> None:
        match step:
            case Arrive(barrier, label):
                state.loading[name] -= self.read_until_arrival
                self._arrive(state, name, barrier, label)
            case BarArrive(barrier, label):
                state.loading[name] -= self.read_until_arrival
                self._round_completes(state, name, barrier, label, self.protocol.named_barriers[barrier])
            case Copy(regions=regions, label=label):
                self._check_unused(state, regions, f"copy of {label}")
                self._check_fenced(state, regions, f"copy of {label}")
                state.memory.update(dict.fromkeys(regions, IN_FLIGHT))
                state.copies |= {step}
            case Store(regions, label):
                self._check_unused(state, regions, f"{name}'s store of {label}")
                state.memory.update(dict.fromkeys(regions, label))
                state.unfenced[name] |= set(regions)
            case Fence():
                state.unfenced[name] = frozenset()
                state.loading[name] &= self.read_until_arrival
            case Load(region=region, label=label):
                self._check_reads(state, ((region, label),), f"{name}'s load")
                state.loading[name] |= {region}
            case Mma(reads):
                state.loading[name] &= self.read_until_arrival
                self._check_reads(state, reads, f"{name}'s MMA")
                self._check_fenced(state, _regions(step), f"{name}'s MMA")
                state.reading[name] |= set(_regions(step))
            case MmaWait(_, pending):
                state.reading[name] = frozenset(region for region, _ in pending)

    def _settle(self, state: State) -> None:
        """Take waits that are over at once: fewer orders, the same outcomes. `_check_overrun` covers the late ones."""
        for name, steps in self.programs.items():
            at = state.at[name]
            while at < len(steps):
                match step := steps[at]:
                    case Wait() if self._has_completed(state, name, step):
                        at += 1
                    case BarWait(barrier) if name not in state.arrived[barrier][0]:
                        at += 1
                    case _:
                        break
            state.at[name] = at

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
        block = self.protocol.block_of.get(barrier)
        if block and all(state.at[other] == len(self.programs[other]) for other in block):
            raise Violation(f"{name} arrives at {barrier} for {label}, and the thread block that it lies in has ended")
        if self._round_completes(state, name, barrier, label, self.protocol.mbarriers[barrier]):
            state.phases[barrier] += 1
            self._check_overrun(state, barrier)

    def _round_completes(self, state: State, name: str, barrier: str, label: Label, needed: int) -> bool:
        arrived, of = state.arrived[barrier]
        if name in arrived or of not in (None, label):
            raise Violation(f"{name} arrives at {barrier} for {label} while the round for {of} is open")
        arrived |= {name}
        complete = len(arrived) == needed
        state.arrived[barrier] = NOBODY if complete else (arrived, label)
        return complete

    def _check_reads(self, state: State, reads: Reads, who: str) -> None:
        for region, label in reads:
            if state.memory[region] != label:
                raise Violation(f"{who} expects {label} in {region}, which holds {state.memory[region]}")

    def _check_fenced(self, state: State, regions: tuple[str, ...], who: str) -> None:
        for name, stored in state.unfenced.items():
            if not stored.isdisjoint(regions):
                raise Violation(f"{who} uses what {name} has stored but not fenced: {stored.intersection(regions)}")

    def _check_unused(self, state: State, regions: tuple[str, ...], who: str) -> None:
        for what, by in ("an MMA", state.reading), ("a load", state.loading):
            for name, reading in by.items():
                if not reading.isdisjoint(regions):
                    raise Violation(f"{who} overwrites {reading.intersection(regions)}, which {what} of {name} reads")
        for copy in state.copies:
            if not set(regions).isdisjoint(copy.regions):
                raise Violation(f"{who} overwrites some of {copy.regions}, into which a copy is in flight")

    def _check_end(self, state: State) -> None:
        stuck = {
            name: str(steps[state.at[name]]) for name, steps in self.programs.items() if state.at[name] < len(steps)
        }
        if stuck:
            raise Violation(f"deadlock: {stuck}")
        if still_open := {barrier: of for barrier, of in state.arrived.items() if of != NOBODY}:
            raise Violation(f"the programs end with open rounds: {still_open}")


def _turn(steps: Sequence[Step], begin: int) -> Sequence[Step]:
    """What a program does without letting the others take turns."""
    end = begin + 1
    while end < len(steps) and not isinstance(steps[end - 1], ENDS_TURN) and not isinstance(steps[end], BEGINS_TURN):
        end += 1
    return steps[begin:end]


def _regions(step: Step) -> tuple[str, ...]:
    match step:
        case Copy() | Store():
            return step.regions
        case Load():
            return (step.region,)
        case Mma():
            return tuple(region for region, _ in step.reads)
    return ()


def _trail(origin: Origin, key: Key) -> list[str]:
    moves: list[str] = []
    while (step := origin[key]) is not None:
        key, move = step
        moves.append(move)
    return moves[::-1]
