"""The command `asr-exit`: one module per subcommand, each with HELP, add_arguments(parser) and run(arguments)."""
