"""Images token by token in raster order, by autoregressive models."""
