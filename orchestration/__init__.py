"""The system around the method: the command line, Ray clusters, MLflow, evaluation, pictures in and out, serving."""
