"""Where other evaluation programs meet the library."""
