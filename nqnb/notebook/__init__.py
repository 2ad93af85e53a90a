"""The notebook's side of nqnb: sync sessions over one background event loop, a worker in the kernel, live tables."""
