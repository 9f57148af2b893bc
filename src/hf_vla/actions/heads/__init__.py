"""Action heads: networks that turn VLM features into a chunk of continuous actions."""
