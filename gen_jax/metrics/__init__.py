"""How good samples are: distances between sets of images, and exact readings of known sets."""
