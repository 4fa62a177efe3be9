"""How bytes get to disk and back: whole, checked, and never half replaced."""
