"""The command line. `app` has the list of commands; what each does stands in the modules beside it."""
