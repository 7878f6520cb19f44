"""What a clone of this repository needs to work in it: environment, checks, tests, locks.

Standard library only, because it runs before anything is installed.
"""
