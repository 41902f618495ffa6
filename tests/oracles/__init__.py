"""Networks in closed form go through the programs, whose results are then known."""
