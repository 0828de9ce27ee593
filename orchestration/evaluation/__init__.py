"""An evaluation of a model at an address: chunks on this machine or a cluster, the report on disk and in MLflow."""
