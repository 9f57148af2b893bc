"""pi0: the model is transformers' own, made to train and act like the families of this library."""
