"""Translation one token at a time, all at once, and in rounds, on one architecture."""
