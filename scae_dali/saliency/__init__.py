"""Saliency maps of a network: which layer, by which method, and the pass that writes them."""
