"""``python -m gateway``: the same as ``imageway``."""

from gateway.cli import main

main()
