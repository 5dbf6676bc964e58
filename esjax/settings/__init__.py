"""Settings: their schema, and the files and options that give them."""
