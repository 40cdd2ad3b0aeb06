"""One file per experiment: `python -m experiments.<name> --help`."""
