"""One file per experiment: its docstring tells the command, the hardware and the expected result."""
