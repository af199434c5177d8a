"""The paper's second experiment: a diffusion model of one set of images, adapted to another."""
