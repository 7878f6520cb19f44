"""Loads one replica's shards and keeps them resident for the engine."""
