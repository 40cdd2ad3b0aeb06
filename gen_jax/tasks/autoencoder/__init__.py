"""Autoencoders of images, the first of two stages."""
