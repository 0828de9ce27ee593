"""What is wrong with this machine, its servers, or a cluster."""
