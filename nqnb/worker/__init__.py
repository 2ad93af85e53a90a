"""The worker: handlers, the processing of deliveries from claim to finish, and ways to stop handlers."""
