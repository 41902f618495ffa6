"""`python -m diffjax` is the command `diffjax`."""

from diffjax.cli import main

if __name__ == "__main__":
    main()
