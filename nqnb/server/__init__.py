"""Real NATS servers on this machine: the bundled binary, a server of one program, one that outlives it, a cluster."""
