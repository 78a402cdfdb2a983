"""The command line. Law: one file is one command, its help, its arguments and its run; ``cli.py`` lists them."""
