"""What is wrong with a cluster or a node, and the fix."""
