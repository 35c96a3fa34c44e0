"""The views for terminals: `status` draws the queue and imports only rich; `comparison` draws recorded experiments."""

from __future__ import annotations

from mbqueue.dashboard.status import render

__all__ = ["render"]
