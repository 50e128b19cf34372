"""How much memory and time a config takes: arithmetic on sizes."""
