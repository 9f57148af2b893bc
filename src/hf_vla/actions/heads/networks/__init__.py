"""The networks that action heads are made of."""
