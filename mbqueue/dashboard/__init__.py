"""What the terminal shows: `status` draws the queue (light: rich only), `comparison` recorded experiments."""

from __future__ import annotations

from mbqueue.dashboard.status import render

__all__ = ["render"]
