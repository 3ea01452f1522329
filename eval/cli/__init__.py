"""What the command line says: one file per command."""
