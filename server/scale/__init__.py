"""Many replicas behind one address, on Ray Serve."""
