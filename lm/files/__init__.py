"""Files: atomic writes, checksums, and validated reads."""
