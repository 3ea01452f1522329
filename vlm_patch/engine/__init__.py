"""How a forward is followed and edited."""
