"""Connect to a server, and read and write NQ's data on the server. No other package imports nats.

Clients and workers use the module `backend`, which is built on the other modules: `connect` opens a connection, and
`connection` sends requests. `fast_client` is a faster nats-py client, and `server_errors` converts errors from the
server and from nats-py to nqnb's errors. `queue_streams`, `messages`, `schedules`, `bucket` and `bucket_reader` read
and write the data on the server. Workers also use `pull`, `delivery`, `cancels`, `presence` and `lost_messages`.
"""
