"""The worker: handlers, the processing of a delivery from claim to finish, and ways to stop a handler."""
