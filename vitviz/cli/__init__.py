"""The command line: options, commands, what the terminal shows; computes nothing."""
