"""Fine-tuning on transformers' Trainer and Accelerate."""
