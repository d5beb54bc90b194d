"""Which implementation of an op runs: decided by name or by order, with the reason when one cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P")
"""The protocol of an op: what its implementations supply."""


class KernelUnavailable(ValueError):
    """The requested implementation cannot run here. The message says why, and which ones can run."""


@dataclass(frozen=True)
class Implementation(Generic[P]):
    """One way to compute an op."""

    name: str
    devices: frozenset[str]
    """Device types that it runs on."""
    unavailable: Callable[[], str | None]
    """Returns None where the implementation can run, else the reason it cannot."""
    make: Callable[[], P]
    """Imports what it needs and returns the object that satisfies the op's protocol."""

    def reason_against(self, device: str) -> str | None:
        """Why it cannot run on `device`. None: it can."""
        if device not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))} only"
        return self.unavailable()


class Op(Generic[P]):
    """The implementations of one op, best first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._known: dict[str, Implementation[P]] = {}
        self._objects: dict[tuple[str, str], P] = {}

    def register(self, implementation: Implementation[P]) -> None:
        """Append an implementation; earlier ones win under `auto`."""
        if implementation.name in self._known:
            raise ValueError(f"{self.name}: implementation '{implementation.name}' is registered twice; each name belongs to one implementation")
        self._known[implementation.name] = implementation

    def implementations(self) -> tuple[Implementation[P], ...]:
        """Everything registered, best first."""
        return tuple(self._known.values())

    def status(self, device: str) -> dict[str, str | None]:
        """Name -> None where it can run on `device`, else the reason it cannot."""
        return {name: implementation.reason_against(device) for name, implementation in self._known.items()}

    def check_name(self, requested: str) -> None:
        """Raises KernelUnavailable for a name that is neither "auto" nor an implementation's."""
        if requested != "auto" and requested not in self._known:
            raise KernelUnavailable(f"{self.name}: there is no implementation '{requested}'; known: auto, {', '.join(self._known)}")

    def choose(self, requested: str, device: str) -> str:
        """The name that `requested` ("auto" or a name) stands for on `device`; raises KernelUnavailable with every reason."""
        self.check_name(requested)
        refused = []
        for name, implementation in self._known.items():
            if requested not in ("auto", name):
                continue
            reason = implementation.reason_against(device)
            if reason is None:
                return name
            refused.append(f"{name}: {reason}")
        usable = [name for name, reason in self.status(device).items() if reason is None]
        advice = f"; use {' or '.join(usable)}" if usable else ""
        raise KernelUnavailable(f"{self.name}: '{requested}' cannot run on {device} ({'; '.join(refused) or 'none is registered'}){advice}")

    def better(self, chosen: str, device: str) -> dict[str, str]:
        """The implementations for `device` that come before `chosen` and cannot run -> the reason."""
        before = list(self._known.values())[: list(self._known).index(chosen)]
        reasons = {each.name: each.reason_against(device) for each in before if device in each.devices}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def resolve(self, requested: str, device: str) -> P:
        """The object that computes the op; made once per (request, device)."""
        key = (requested, device)
        if key not in self._objects:
            self._objects[key] = self._known[self.choose(requested, device)].make()
        return self._objects[key]
