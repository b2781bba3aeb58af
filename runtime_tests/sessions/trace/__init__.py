"""Where an artifact's numbers leave the reference: what each part of each layer gives, beside eager PyTorch.

A probe is the artifact as shipped, opened so that values inside it can be read; each format has a module.
"""
