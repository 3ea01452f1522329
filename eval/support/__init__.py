"""Which models and ways of generating work, measured against a slow literal reference."""
