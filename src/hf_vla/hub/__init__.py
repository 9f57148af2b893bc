"""The Hugging Face Hub: pushing checkpoints, model cards, code that travels with them."""
