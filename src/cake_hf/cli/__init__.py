"""The command line. `app` lists the commands; the modules beside it implement them."""
