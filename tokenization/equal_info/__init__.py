"""Equal-Info windows: text cut into tokens of equal information."""
