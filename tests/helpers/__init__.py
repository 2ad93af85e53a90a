"""Helpers that tests share: waits, programs to start, bad values, and reads of what the server stores."""
