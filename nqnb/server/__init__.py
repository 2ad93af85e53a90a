"""Run NATS servers on this machine (a dev server, a detached server or a cluster), and choose a server to use."""
