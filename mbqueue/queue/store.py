"""The queue: one class out of parts that share one database."""

from __future__ import annotations

from mbqueue.queue.adopting import Adopting
from mbqueue.queue.enqueue import Enqueueing
from mbqueue.queue.leases import Leases
from mbqueue.queue.overview import Reports
from mbqueue.queue.sessions import Sessions
from mbqueue.queue.steering import Steering


class Queue(Enqueueing, Leases, Sessions, Steering, Reports, Adopting):
    """The queue of a project, in one SQLite file (``state/queue.db``) on a local disk.

    Any number of processes and threads may use it at once. Every method is one transaction: when it returns, its
    effect is on the disk; when it raises, it had none. Time is always passed in (`now`, seconds since the epoch).

    Exclusion ends where clocks disagree: a lease that its holder did not renew in time, by the clock of whoever
    claims next, is given away. The former holder can then change nothing (its fence is old), so a wrong clock
    costs work that is done twice, never a result that is written twice.
    """
