"""``python -m fp4compile``: the command line of ``cli.py``."""

from fp4compile.cli import main

main()
