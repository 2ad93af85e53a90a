"""Connections to a server, and access to everything that NQ stores on it. No other package imports nats.

Clients and workers call `backend`. `connect` opens a connection, `connection` sends requests over it, `fast_client` is
nats-py with a fast path, and `server_errors` translates the errors of the server and of nats-py. `queue_streams`,
`messages`, `schedules`, `bucket` and `bucket_reader` read and write the data on the server. Workers also use `pull`,
`delivery`, `cancels`, `presence` and `lost_messages`.
"""
