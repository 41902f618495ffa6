"""Run the command `diffjax train`."""

import sys

from diffjax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
