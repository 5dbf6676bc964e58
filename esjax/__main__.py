"""``python -m esjax`` is ``esjax``."""

from esjax.cli import main

main()
