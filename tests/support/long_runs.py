"""Whether tests run all their cases, which takes hours, or a sample (docs/explanation/reliability.md)."""

from __future__ import annotations

import os

#: Set by MBQUEUE_LONG=1.
LONG = os.environ.get("MBQUEUE_LONG", "") not in {"", "0"}
