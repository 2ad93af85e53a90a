"""The notebook side of nqnb: sync sessions over one background event loop, workers in the kernel, and live tables."""
