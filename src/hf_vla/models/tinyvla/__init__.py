"""TinyVLA: a vision-language model whose hidden states condition a continuous action head."""
