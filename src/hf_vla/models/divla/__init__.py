"""DiVLA: a vision-language model that reasons in words, which modulate what conditions a continuous action head."""
