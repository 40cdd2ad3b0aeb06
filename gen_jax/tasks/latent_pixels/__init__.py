"""Images all at once from a latent vector that all their tokens share."""
