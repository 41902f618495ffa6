"""Networks and what they are conditioned on."""
