"""The only package that imports nats: a connection to a server, and everything that NQ keeps on it.

`backend` is the face of the package: clients and workers call it. `connect` opens a connection, `connection` sends
requests over it, `fast_client` is nats-py with a fast path, and `server_errors` translates foreign errors.
`queue_streams`, `messages`, `schedules` and `bucket` with its `bucket_reader` are about what is stored on the server.
A worker pulls with `pull`, answers a `delivery`, receives `cancels`, announces its `presence`, and finds
`lost_messages`.
"""
