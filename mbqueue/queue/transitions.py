"""The table of allowed changes of a job's state.

mbqueue writes the table into a database when it creates or upgrades a queue. A trigger in the database aborts every
change of state that is not in the table, whichever program attempts it. `mermaid()` draws the diagram in
ARCHITECTURE.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from mbqueue.queue.jobs import State


@dataclass(frozen=True)
class Transition:
    """An allowed change of state, and the reason for it."""

    from_state: State
    to_state: State
    reason: str


#: The state of every new job. A job without dependencies becomes ready in the transaction that creates it.
INITIAL_STATE = State.WAITING

TRANSITIONS = (
    Transition(State.WAITING, State.READY, "all that it needs is done"),
    Transition(State.READY, State.LEASED, "claimed"),
    Transition(State.WAITING, State.LEASED, "claimed by the session that committed the epoch before"),
    Transition(State.LEASED, State.COMMITTED, "committed"),
    Transition(State.LEASED, State.READY, "released, cut off, or failed with attempts left"),
    Transition(State.LEASED, State.FAILED, "attempts exhausted"),
    Transition(State.WAITING, State.SKIPPED, "early stopping, or pruned"),
    Transition(State.READY, State.SKIPPED, "pruned"),
    Transition(State.WAITING, State.CANCELLED, "cancelled"),
    Transition(State.READY, State.CANCELLED, "cancelled"),
    Transition(State.LEASED, State.CANCELLED, "cancelled, the holder loses its lease"),
    Transition(State.FAILED, State.CANCELLED, "cancelled"),
    Transition(State.FAILED, State.WAITING, "retried"),
    Transition(State.CANCELLED, State.WAITING, "retried"),
    Transition(State.READY, State.WAITING, "rewound, or folds were added"),
    Transition(State.LEASED, State.WAITING, "rewound, the holder loses its lease"),
    Transition(State.COMMITTED, State.WAITING, "rewound, or folds were added"),
    Transition(State.SKIPPED, State.WAITING, "rewound, or retried after it was pruned"),
    Transition(State.WAITING, State.COMMITTED, "adopted from a published commit"),
    Transition(State.READY, State.COMMITTED, "adopted from a published commit"),
)


def mermaid() -> str:
    """Render the allowed transitions as a Mermaid state diagram."""
    arrows = [f"    {row.from_state} --> {row.to_state}: {row.reason}" for row in TRANSITIONS]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {INITIAL_STATE}: enqueued", *arrows])
