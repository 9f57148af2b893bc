"""SpatialVLA: a vision-language model with 3D position encoding and adaptive action grids."""
