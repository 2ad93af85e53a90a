"""The only package that imports nats: a connection to a server, and everything that NQ stores on the server.

`backend` is the interface of the package, which clients and workers call. `connect` opens a connection, `connection`
sends requests over it, `fast_client` is nats-py with a fast path, and `server_errors` translates the errors of the
server and of nats-py. `queue_streams`, `messages`, `schedules`, `bucket` and `bucket_reader` read and write the data on
the server. A worker pulls tasks with `pull`, acks a `delivery`, receives `cancels`, announces its `presence`, and finds
`lost_messages`.
"""
