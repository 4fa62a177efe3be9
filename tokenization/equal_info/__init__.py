"""Equal-Info windows: text segmented into tokens that cost equally many bits."""
