"""`python -m diffjax` is the command `diffjax`."""

from diffjax.cli import main

main()
