"""Real NATS servers on this machine: the bundled binary, a dev server, a detached server and a cluster."""
