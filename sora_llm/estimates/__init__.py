"""How much memory and time a config takes, by arithmetic on sizes."""
