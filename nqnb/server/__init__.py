"""Run NATS servers on this machine (dev server, detached server or cluster), and choose the server to connect to."""
