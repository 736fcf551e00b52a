"""Run the command line with ``python -m vitviz``."""

from vitviz.cli import main

main()
