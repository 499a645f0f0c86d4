"""Examples that are no pairs: pictures that are liked or not, and ranked lists; lists that are made of pairs."""
