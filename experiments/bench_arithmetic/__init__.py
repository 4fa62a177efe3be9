"""Speed and code length of the arithmetic coder, compared with `constriction`."""
