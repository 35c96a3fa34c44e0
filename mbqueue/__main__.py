"""``python -m mbqueue`` is ``mbqueue``."""

from mbqueue.cli import main

main()
