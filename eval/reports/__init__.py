"""How runs are shown side by side."""
