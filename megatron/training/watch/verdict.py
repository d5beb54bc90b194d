"""From the places of all processes: does the run hang, and what the report says. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megatron.training.watch.place import STEP, Account, Group, Place


def hangs(places: Sequence[Place], limit_s: float) -> bool:
    """Whether the run hangs.

    In a step, a process that has not moved for `limit_s` waits for one that will not come. Outside of steps (start, first step, evaluation, saving)
    the others may wait for the one that works, however long: the run hangs only if no process has moved for `limit_s`.
    """
    if not places:
        return False
    still = [place.still_s for place in places]
    return (max(still) if all(place.phase == STEP for place in places) else min(still)) >= limit_s


def report(places: Mapping[int, Place], accounts: Mapping[int, Account], limit_s: float) -> str:
    """Each process's stack, then who is where. `accounts`: of the processes that answered."""
    parts = []
    for rank, account in sorted(accounts.items()):
        parts.append(f"---- Process {rank} ({account.place.host}, pid {account.place.pid}), step {account.place.step + 1} ----\n{account.stacks}")
    return "".join(parts) + "---- The run hangs ----\n" + "\n".join(summary(places, accounts, limit_s)) + "\n"


def summary(places: Mapping[int, Place], accounts: Mapping[int, Account], limit_s: float) -> Iterator[str]:
    """Sentences: the step, which operation who entered and who did not, where each process is."""
    steps = {account.place.step + 1 for account in accounts.values()}
    step = f"step {min(steps)}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}"
    yield f"The run hangs in {step}: processes have waited for {limit_s:g} s and more (collective_timeout_s)."
    yield from missing(accounts, sorted(places))
    alike: dict[tuple[str | None, str], list[int]] = defaultdict(list)
    for rank, account in sorted(accounts.items()):
        alike[account.place.operation, account.place.line].append(rank)
    for (operation, line), ranks in alike.items():
        where = "in no collective operation" if operation is None else f"in {operation}"
        yield f"{who(ranks)} {'is' if len(ranks) == 1 else 'are'} {where}: {line}."
    for rank in sorted(set(places) - set(accounts)):
        place = places[rank]
        yield (
            f"Process {rank} ({place.host}, pid {place.pid}) does not answer: it is stopped, or compiled code in it does not return. "
            f"It was last seen at {place.line}."
        )


def missing(accounts: Mapping[int, Account], ranks: Sequence[int]) -> Iterator[str]:
    """For each group with an operation that is not complete: who entered it, who did not. `ranks`: the processes that were asked."""
    views: dict[tuple[str, tuple[int, ...]], dict[int, Group]] = defaultdict(dict)
    for rank, account in accounts.items():
        for name, group in account.groups.items():
            views[name, group.members][rank] = group
    for (_, members), seen in views.items():
        number = max(group.entered for group in seen.values())
        waiting = {rank: group for rank, group in seen.items() if group.entered == number and group.pending}
        absent = [rank for rank, group in sorted(seen.items()) if group.entered < number]
        silent = [rank for rank in members if rank in ranks and rank not in seen]
        if not waiting:
            continue
        name = next(iter(waiting.values())).pending[-1]
        among = "all processes" if list(members) == list(ranks) else f"the processes {listed(members)}"
        never = f"; never entered by {listed(absent)}" if absent else ""
        never += f"; never entered, as far as is known, by {listed(silent)}" if silent else ""
        yield f"{name}, operation {number} among {among}: entered by {listed(sorted(waiting))}{never}."


def who(ranks: Sequence[int]) -> str:
    return f"Process {ranks[0]}" if len(ranks) == 1 else f"Processes {listed(ranks)}"


def listed(ranks: Iterable[int]) -> str:
    """`0 to 3, 7`"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
