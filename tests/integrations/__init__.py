"""squish_nf4 under other libraries: PEFT, accelerate."""
