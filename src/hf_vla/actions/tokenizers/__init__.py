"""Action tokenizers: normalised action chunks to ids and back; numpy, no parameters."""
