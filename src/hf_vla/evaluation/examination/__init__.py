"""What the doctor looks at, one small function for every line; `hf_vla.evaluation.doctor` lists them."""
