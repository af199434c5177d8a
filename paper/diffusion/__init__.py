"""The paper's second experiment: a diffusion model of one image data set, adapted to another."""
