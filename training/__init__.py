"""Training: losses, stages, engines, checkpoints and evaluation, for one process or many; without Ray or MLflow."""
