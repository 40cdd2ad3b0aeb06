"""Images in two stages: an autoencoder, and a prior in its compressed space."""
