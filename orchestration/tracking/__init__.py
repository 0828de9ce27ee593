"""MLflow as the store of runs: parameters, figures, artifacts, and what happens while it is away."""
