"""``squish-nf4 demo``: a real sentence model in NF4 against the dense one, drawn, converted, verified and inspected."""
