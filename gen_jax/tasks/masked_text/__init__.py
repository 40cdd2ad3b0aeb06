"""Text by masked models, in rounds over all tokens."""
