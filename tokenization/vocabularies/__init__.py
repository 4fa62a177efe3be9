"""Ways to cut text into tokens, one file each."""
