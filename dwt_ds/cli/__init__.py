"""The console command `dwt-ds`, one file a subcommand."""
