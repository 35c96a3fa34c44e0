"""mbqueue: very long CHGNet training runs on short GPU sessions.

    from mbqueue import Project

`mbqueue.api` documents what you can do with a project. Importing mbqueue is fast, because the package imports a name's
module only when you first use the name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbqueue.api import Project, Status, status, watch
    from mbqueue.web.serving import board

__all__ = ["Project", "Status", "__version__", "board", "status", "watch"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mbqueue' has no attribute {name!r}")
    if name == "board":
        from mbqueue.web.serving import board  # noqa: PLC0415 - so that `import mbqueue` stays light

        return board
    from mbqueue import api  # noqa: PLC0415 - so that `import mbqueue` stays light

    return getattr(api, name)
