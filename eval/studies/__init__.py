"""What several runs together answer."""
