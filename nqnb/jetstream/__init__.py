"""The only room that speaks with NATS."""
