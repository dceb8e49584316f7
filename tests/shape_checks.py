"""The type checker that jaxtyping applies to redraft in tests: an int passes for a float, as in Python."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
