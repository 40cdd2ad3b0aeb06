"""Images by masked models, in rounds over all pixels."""
