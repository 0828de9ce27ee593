"""What runs on Ray clusters: jobs, training workers, their sizes and devices."""
