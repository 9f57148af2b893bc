"""The `hf-vla` command line: one file per subcommand, each thin over the library."""
