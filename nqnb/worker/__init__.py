"""Runs tasks: handlers, one delivery's life from claim to finish, and the ways to stop code."""
