"""`python -m critrm` is `critrm`."""

from critrm.cli import main

main()
