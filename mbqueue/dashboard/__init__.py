"""The terminal's views: `status` draws the queue (it imports only rich), `comparison` draws recorded experiments."""

from __future__ import annotations

from mbqueue.dashboard.status import render

__all__ = ["render"]
