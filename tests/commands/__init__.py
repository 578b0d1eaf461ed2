"""squish_nf4/commands and doctor: what the command line takes, prints and ends with."""
