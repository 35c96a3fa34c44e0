"""Draw views for terminals and notebooks. `status` shows the queue, and `comparison` compares recorded experiments."""

from __future__ import annotations

from mbqueue.dashboard.status import render

__all__ = ["render"]
