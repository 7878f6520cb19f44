"""A cold start as spans of time, and their drawings."""
