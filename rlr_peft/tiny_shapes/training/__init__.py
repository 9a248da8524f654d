"""How the shipped weights were made: data, training loops and export. Not needed to use them."""
