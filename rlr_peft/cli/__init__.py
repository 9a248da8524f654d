"""Console commands: `rlr-peft COMMAND`. Each is a thin file that calls the library."""
