"""The command line. One file is one command: its help, its arguments and its run; the work is done in other rooms."""
