"""Sizes, rates and prices: pure functions of numbers that are given or looked up."""
