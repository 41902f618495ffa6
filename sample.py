"""Run the command `diffjax sample`."""

import sys

from diffjax.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
