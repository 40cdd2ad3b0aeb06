"""What generating all units at once costs on known distributions, and what repairs get back."""
