"""What the tests share: waits, programs that they start, bad values, and looks at what the server stores."""
