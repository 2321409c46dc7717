"""Operators, one idea a file. Each imports torch only and can be copied out of the house alone."""
