"""The worker: handlers, the life of a delivery from claim to finish, and the ways to stop running code."""
