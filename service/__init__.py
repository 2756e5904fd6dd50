"""The gRPC service around :mod:`asr_exit`: server, sessions, client and command line."""
