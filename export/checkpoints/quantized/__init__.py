"""Hugging Face folders whose weights are stored as integers: one module for each way of storing them."""
