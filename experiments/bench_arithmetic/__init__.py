"""Speed and length of the arithmetic coder by itself, beside `constriction`."""
