"""How responses are scored: one file or folder per benchmark."""
