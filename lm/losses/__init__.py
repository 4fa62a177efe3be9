"""Losses of hidden states; each names the sums it reports."""
