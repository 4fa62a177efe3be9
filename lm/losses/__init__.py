"""Losses as functions of hidden states; each names the sums that it reports."""
