"""Runs as TensorBoard, Weights & Biases and MLflow show them: each told by a process that follows the run's folder."""
