"""What tests of the operator on a real API server act with: a client, a world, a kubelet."""
