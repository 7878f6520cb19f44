"""Engine side: maps resident weights into the serving process."""
