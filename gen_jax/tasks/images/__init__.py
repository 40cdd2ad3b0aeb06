"""Images by diffusion models, conditioned on their classes or not."""
