# SPDX-License-Identifier: Apache-2.0
"""Running programs: device loops, and the two programs of an LNC pair with their meeting points.

The two programs run on two threads of which exactly one holds the baton, so results do not depend on scheduling.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .errors import DeadlockError, LawError, at_line
from .machine import INSTRUCTIONS_PER_ITERATION, Core, Machine
from .state import Register, current, set_current


class Pair:
    """Baton and mailbox of two programs."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.turn = 0
        self.waiting: dict[int, str] = {}
        self.done: set[int] = set()
        self.posts: dict[tuple[int, str, int], Any] = {}
        self.counts: dict[tuple[int, str], int] = {}
        self.failed: BaseException | None = None

    def hand_over(self, core: int, until: Callable[[], bool]) -> None:
        """Give the baton away until `until()` holds. Caller must hold the condition."""
        other = 1 - core
        while not until():
            if self.failed is not None:
                raise DeadlockError("the other program of the pair failed")
            if other in self.done or (other in self.waiting and not self._can_run(other)):
                where = "has finished" if other in self.done else f"waits in {self.waiting[other]}"
                raise DeadlockError(f"core {core} waits in {self.waiting[core]}, core {other} {where}{at_line()}")
            self.turn = other
            self.condition.notify_all()
            self.condition.wait_for(lambda: self.turn == core or self.failed is not None)

    def _can_run(self, core: int) -> bool:
        key = self.waiting[core]
        number = self.counts[(core, key)] - 1
        return (1 - core, key, number) in self.posts


def meet(core: Core, key: str, payload: Any) -> Any:
    """Exchange `payload` with the other core at its n-th `key`; returns the other's payload."""
    pair: Pair = core.machine.pair
    with pair.condition:
        number = pair.counts.get((core.index, key), 0)
        pair.counts[(core.index, key)] = number + 1
        pair.posts[(core.index, key, number)] = payload
        pair.waiting[core.index] = f"{key}"
        wanted = (1 - core.index, key, number)
        pair.hand_over(core.index, lambda: wanted in pair.posts)
        del pair.waiting[core.index]
        return pair.posts.pop(wanted)


def run_programs(machine: Machine, body: Callable[[Core], Any]) -> list[Any]:
    """Run `body` once per core; returns the results in core order."""
    if machine.num_cores == 1:
        set_current(machine.cores[0])
        try:
            return [body(machine.cores[0])]
        finally:
            set_current(None)
    pair = Pair()
    machine.pair = pair
    results: list[Any] = [None, None]
    errors: list[BaseException | None] = [None, None]

    def program(core: Core) -> None:
        set_current(core)
        try:
            with pair.condition:
                pair.condition.wait_for(lambda: pair.turn == core.index or pair.failed is not None)
            if pair.failed is None:
                results[core.index] = body(core)
        except BaseException as error:
            errors[core.index] = error
            pair.failed = pair.failed or error
        finally:
            with pair.condition:
                pair.done.add(core.index)
                pair.turn = 1 - core.index
                pair.condition.notify_all()

    # Daemons: after Ctrl-C in `join` the interpreter must not wait for a kernel that never ends.
    threads = [
        threading.Thread(target=program, args=(core,), name=f"core{core.index}", daemon=True) for core in machine.cores
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: the programs end at their next meeting point or device loop
        with pair.condition:
            pair.failed = pair.failed or error
            pair.condition.notify_all()
        raise
    if pair.failed is not None:
        raise pair.failed
    return results


def _bound(value: Any, what: str) -> int:
    if isinstance(value, Register):
        return value.get()
    if isinstance(value, (int, np.integer)):
        return int(value)
    raise LawError(f"{what}: got {value!r}, need an int or a register{at_line()}")


def _step(step: Any, what: str) -> int:
    if not isinstance(step, int) or step < 1:
        raise LawError(f"{what}: step: got {step!r}, need a positive compile-time int{at_line()}")
    return step


def _enter(core: Core, what: str) -> None:
    if core.loop_depth and core.version == 2:
        raise LawError(f"{what}: device loops do not nest on NeuronCore-v2{at_line()}")
    if core.loop_depth:
        core.machine.ambiguous(f"{what}: nested device loop")
    core.loop_depth += 1


def _iterate(core: Core, what: str, n: int, recorded: int = 0) -> None:
    """Begin iteration `n` of a loop whose earlier ones recorded so many events."""
    if core.machine.pair is not None and core.machine.pair.failed is not None:
        raise DeadlockError("the other program of the pair failed")
    limit = core.machine.max_iterations
    bounds = ((n + 1, limit, "iterations"), (recorded, limit * INSTRUCTIONS_PER_ITERATION, "instructions"))
    for count, bound, unit in bounds:
        if count > bound:
            raise DeadlockError(
                f"{what}: more than {bound} {unit}{at_line()}; raise max_iterations (--max-loop-iterations) if intended"
            )
    core.record("loop_iteration", "sync", (), (), barrier=True)


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Register], Any], step: int = 1) -> None:
    """Device loop: body_fun(i) for i = lower, lower+step, … < upper; i is a register."""
    core = current()
    start, stop, step = _bound(lower, "fori_loop lower"), _bound(upper, "fori_loop upper"), _step(step, "fori_loop")
    _enter(core, "fori_loop")
    try:
        for n, i in enumerate(range(start, stop, step)):
            _iterate(core, "fori_loop", n)
            if body_fun(Register(i)) is not None:
                raise LawError(f"fori_loop: the body must return None{at_line()}")
    finally:
        core.loop_depth -= 1


def while_loop(init: Register, body_fun: Callable[[Register], Register]) -> None:
    """Device loop while the register is nonzero; the body returns the next condition register."""
    core = current()
    if not isinstance(init, Register):
        raise LawError(f"while_loop: init: got {init!r}, need a register{at_line()}")
    _enter(core, "while_loop")
    try:
        n, condition, start = 0, Register(init.get()), len(core.events)
        while condition.get() != 0:
            _iterate(core, "while_loop", n, len(core.events) - start)
            following = body_fun(Register(condition.get()))
            if not isinstance(following, Register):
                raise LawError(f"while_loop: the body must return the next condition register{at_line()}")
            condition = Register(following.get())
            n += 1
    finally:
        core.loop_depth -= 1


def dynamic_range(start: Any, stop: Any = None, step: int = 1) -> Iterator[int]:
    """Deprecated device loop of the old parser front end; yields ints."""
    core = current()
    core.machine.ambiguous("nl.dynamic_range is deprecated; use nl.fori_loop")
    first, last = (0, start) if stop is None else (start, stop)
    _enter(core, "dynamic_range")
    try:
        for n, i in enumerate(
            range(_bound(first, "dynamic_range"), _bound(last, "dynamic_range"), _step(step, "dynamic_range"))
        ):
            _iterate(core, "dynamic_range", n)
            yield i
    finally:
        core.loop_depth -= 1
