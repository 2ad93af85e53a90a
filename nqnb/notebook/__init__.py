"""Support for notebooks: synchronous sessions on a background event loop, handlers in the kernel, and live tables."""
