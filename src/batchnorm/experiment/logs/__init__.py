"""Run logs beside our own files: TensorBoard and MLflow."""
