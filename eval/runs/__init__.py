"""How the responses of a run are made and kept."""
