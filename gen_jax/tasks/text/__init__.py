"""Text, token by token, by autoregressive models."""
