"""NATS servers on this machine: the nats-server program, a dev server, a detached server and a cluster."""
