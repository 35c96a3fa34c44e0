"""Run the ``mbqueue`` command as ``python -m mbqueue``."""

from mbqueue.cli import main

main()
