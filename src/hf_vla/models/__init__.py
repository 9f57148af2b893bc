"""Model families; a family is one folder of configuration, model and processor."""
